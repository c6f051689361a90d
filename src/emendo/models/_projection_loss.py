"""The losses behind a vocabulary projection, without a graph over the vocabulary.

What is expected at a label are probabilities ``q`` over the vocabulary: a wanted label's own, 1 at it and 0 elsewhere,
or those that the unedited model gives. With logits ``z = W h + b``, ``p = softmax(z)`` and ``t`` the argmax of ``q``::

    KL(q || p)   = logsumexp(z) - z_t - r . h + c        r = q W - w_t,    c = sum q log q - q . b + b_t
    d KL / d h   = p W - w_t - r

so a token, a row as wide as ``h`` and a number say all that a loss needs of ``q``; of a wanted label, whose KL is its
NLL, ``r`` and ``c`` are 0. For an answer that must stay they are taken once: its logits are neither kept nor computed
again, and no gradient is as wide as the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from emendo.models._packing import even

_ROWS = 8  # go through the elementwise passes at a time on a processor, and stay in its cache


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What is expected at some labels; see the module's text.

    Attributes:
        token: ``[n]`` ``t``.
        row: ``[n, width]`` ``r``, in float32 at least.
        constant: ``[n]`` ``c``.
    """

    token: Tensor
    row: Tensor
    constant: Tensor

    @classmethod
    def wanted(cls, head: nn.Linear, labels: Tensor) -> Expected:
        """The labels ``[n]`` themselves."""
        zeros = head.weight.new_zeros(
            len(labels), head.in_features + 1, dtype=torch.promote_types(head.weight.dtype, torch.float32)
        )
        return cls(labels.to(zeros.device), zeros[:, :-1], zeros[:, -1])

    @classmethod
    @torch.no_grad()
    def given(cls, head: nn.Linear, rows: Tensor) -> Expected:
        """What the projection gives for ``rows [n, width]``."""
        logits = _logits(head, rows)
        token = logits.argmax(-1)
        own = _of(token, logits)
        total = _softmax_(logits)
        row = _apart(head, logits, token)
        return cls(token, row, (row * rows).sum(-1) - (total - own))

    @classmethod
    def unpacked(cls, table: Tensor) -> Expected:
        """From the table of :meth:`packed`."""
        return cls(table[:, 0].long(), table[:, 1:-1], table[:, -1])

    def packed(self) -> Tensor:
        """As one table ``[n, width + 2]``; a token's number is exact in it below 2^24."""
        return torch.cat([self.token[:, None].to(self.row), self.row, self.constant[:, None]], -1)

    def then(self, other: Expected) -> Expected:
        """These labels, and after them others."""
        pairs = ((self.token, other.token), (self.row, other.row), (self.constant, other.constant))
        return Expected(*(torch.cat([one, two.to(one)]) for one, two in pairs))


def divergence(head: nn.Linear, rows: Tensor, expected: Expected) -> tuple[Tensor, Tensor]:
    """``KL(expected || given)`` in nats and in float32 at least, and whether the expected token is the most likely.

    Args:
        head: the projection; it gets no gradient.
        rows: ``[n, width]`` what it is given.
        expected: at each of them.

    Returns:
        Both ``[n]``.
    """
    values, right = _Divergence.apply(rows, head, expected)
    return values, right


class _Divergence(torch.autograd.Function):
    """Its gradient in the rows is taken at once, so that nothing as wide as the vocabulary outlives the call."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: nn.Linear, expected: Expected) -> tuple[Tensor, Tensor]:
        logits = _logits(head, rows)
        own = _of(expected.token, logits)
        right = own >= logits.amax(-1)
        total = _softmax_(logits)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_apart(head, logits, expected.token).sub_(expected.row))
            ctx.dtype = rows.dtype
        ctx.mark_non_differentiable(right)
        return total - own - (expected.row * rows).sum(-1) + expected.constant, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (to_rows,) = ctx.saved_tensors
        return (gradient[:, None] * to_rows).to(ctx.dtype), None, None


def _logits(head: nn.Linear, rows: Tensor) -> Tensor:
    logits = F.linear(_filled(rows), head.weight, head.bias)[: len(rows)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _of(token: Tensor, logits: Tensor) -> Tensor:
    return logits.gather(-1, token[:, None]).squeeze(-1)


def _softmax_(logits: Tensor) -> Tensor:
    """``logits [n, vocabulary]`` to their softmax, in place; returns their logsumexp ``[n]``."""
    total = []
    for part in logits.split(_ROWS if logits.device.type == "cpu" else max(1, len(logits))):
        top = part.amax(-1, keepdim=True)
        mass = part.sub_(top).exp_().sum(-1, keepdim=True)
        part.div_(mass)
        total.append(top.add_(mass.log_()).squeeze(-1))
    return torch.cat(total)


def _apart(head: nn.Linear, share: Tensor, token: Tensor) -> Tensor:
    """``p W - w_t [n, width]`` in the dtype of ``p [n, vocabulary]``."""
    weight = head.weight.detach()
    mean = (_filled(share.to(weight)) @ weight)[: len(share)]
    return mean.to(share).sub_(weight[token])


def _filled(rows: Tensor) -> Tensor:
    more = even(len(rows), rows) - len(rows)
    return F.pad(rows, (0, 0, 0, more)) if more else rows
