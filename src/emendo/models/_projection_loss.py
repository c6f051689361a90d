"""The losses behind a vocabulary projection, without an autograd graph over the vocabulary.

Each label has an expected distribution ``q`` over the vocabulary: one-hot for a target's label, the unedited model's
distribution for a locality label. With logits ``z = W h + b``, ``p = softmax(z)`` and ``t`` the argmax of ``q``::

    KL(q || p)   = logsumexp(z) - z_t - r . h + c        r = q W - w_t,    c = sum q log q - q . b + b_t
    d KL / d h   = p W - w_t - r

so the loss needs only a token, a row as wide as ``h`` and a number from ``q``. For a target's label, whose KL is its
NLL, ``r`` and ``c`` are 0. For a locality label they are computed once: its logits are neither stored nor computed
again, and no gradient is as wide as the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from emendo.models._packing import padded_count

_ROWS = 8  # rows of one elementwise pass on a processor, few enough to stay in its cache


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """The expected distributions of some labels; see the module's docstring for the symbols.

    Attributes:
        token: ``[n]`` ``t``.
        row: ``[n, width]`` ``r``, in float32 at least.
        constant: ``[n]`` ``c``.
    """

    token: Tensor
    row: Tensor
    constant: Tensor

    @classmethod
    def from_labels(cls, head: nn.Linear, labels: Tensor) -> Expected:
        """One-hot distributions at the labels ``[n]``."""
        zeros = head.weight.new_zeros(
            len(labels), head.in_features + 1, dtype=torch.promote_types(head.weight.dtype, torch.float32)
        )
        return cls(labels.to(zeros.device), zeros[:, :-1], zeros[:, -1])

    @classmethod
    @torch.no_grad()
    def from_rows(cls, head: nn.Linear, rows: Tensor) -> Expected:
        """The distributions that the projection gives for its inputs ``rows [n, width]``."""
        logits = _logits(head, rows)
        token = logits.argmax(-1)
        own = _at(token, logits)
        total = _softmax_(logits)
        row = _mean_difference(head, logits, token)
        return cls(token, row, (row * rows).sum(-1) - (total - own))

    @classmethod
    def unpack(cls, table: Tensor) -> Expected:
        """The inverse of :meth:`pack`."""
        return cls(table[:, 0].long(), table[:, 1:-1], table[:, -1])

    def pack(self) -> Tensor:
        """One table ``[n, width + 2]``; token ids in it are exact below 2^24."""
        return torch.cat([self.token[:, None].to(self.row), self.row, self.constant[:, None]], -1)

    def concatenate(self, other: Expected) -> Expected:
        """The distributions of these labels followed by those of others."""
        pairs = ((self.token, other.token), (self.row, other.row), (self.constant, other.constant))
        return Expected(*(torch.cat([one, two.to(one)]) for one, two in pairs))


def divergence(head: nn.Linear, rows: Tensor, expected: Expected) -> tuple[Tensor, Tensor]:
    """``KL(expected || predicted)`` at each label.

    Args:
        head: the projection; it gets no gradient.
        rows: ``[n, width]`` its inputs.
        expected: the expected distribution of each.

    Returns:
        Losses ``[n]`` in nats, in float32 at least; and hits ``[n]``, whether the expected token is the most likely.
    """
    losses, hits = _Divergence.apply(rows, head, expected)
    return losses, hits


class _Divergence(torch.autograd.Function):
    """Computes the gradient in the forward pass, so that nothing as wide as the vocabulary outlives the call."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: nn.Linear, expected: Expected) -> tuple[Tensor, Tensor]:
        logits = _logits(head, rows)
        own = _at(expected.token, logits)
        hits = own >= logits.amax(-1)
        total = _softmax_(logits)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_mean_difference(head, logits, expected.token).sub_(expected.row))
            ctx.dtype = rows.dtype
        ctx.mark_non_differentiable(hits)
        return total - own - (expected.row * rows).sum(-1) + expected.constant, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (to_rows,) = ctx.saved_tensors
        return (gradient[:, None] * to_rows).to(ctx.dtype), None, None


def _logits(head: nn.Linear, rows: Tensor) -> Tensor:
    logits = F.linear(_padded(rows), head.weight, head.bias)[: len(rows)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _at(token: Tensor, logits: Tensor) -> Tensor:
    return logits.gather(-1, token[:, None]).squeeze(-1)


def _softmax_(logits: Tensor) -> Tensor:
    """Turn ``logits [n, vocabulary]`` into their softmax, in place; returns their logsumexp ``[n]``."""
    total = []
    for part in logits.split(_ROWS if logits.device.type == "cpu" else max(1, len(logits))):
        top = part.amax(-1, keepdim=True)
        mass = part.sub_(top).exp_().sum(-1, keepdim=True)
        part.div_(mass)
        total.append(top.add_(mass.log_()).squeeze(-1))
    return torch.cat(total)


def _mean_difference(head: nn.Linear, share: Tensor, token: Tensor) -> Tensor:
    """``p W - w_t [n, width]`` in the dtype of ``p [n, vocabulary]``."""
    weight = head.weight.detach()
    mean = (_padded(share.to(weight)) @ weight)[: len(share)]
    return mean.to(share).sub_(weight[token])


def _padded(rows: Tensor) -> Tensor:
    more = padded_count(len(rows), rows) - len(rows)
    return F.pad(rows, (0, 0, 0, more)) if more else rows
