"""Losses at the label positions: token NLL, hinge, locality KL and squared logits, each averaged per example.

Layout: ``logits [n, vocabulary]`` and ``labels [n]`` are the label positions of all examples, one example after the
other; ``owner [n]`` is the example of each position. An example's loss is the mean over its own positions, so it does
not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``[n, vocabulary]`` and labels ``[n]`` -> the loss ``[n]`` of each label."""


def per_example(values: Tensor, owner: Tensor, examples: int) -> Tensor:
    """Mean of ``values [n]`` over the positions of each example: ``[examples]``."""
    total = values.new_zeros(examples).index_add(0, owner, values)
    count = values.new_zeros(examples).index_add(0, owner, torch.ones_like(values))
    return total / count.clamp(min=1)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log p(label)`` in nats, ``[n]``, in float32 at least."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def token_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``relu(max over other answers of log p - log p(label))`` in nats, ``[n]``, in float32 at least.

    It is 0 where the label is the most likely answer (MEND, Eq. 6, after Sinitsin et al. 2020).
    """
    values = _wide(logits)
    own = values.gather(-1, labels[:, None])
    others = values.scatter(-1, labels[:, None], -torch.inf).amax(-1)
    return F.relu(others - own.squeeze(-1))


def token_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """``KL(reference || edited)`` in nats, ``[n]``, in float32 at least; the reference carries no gradient.

    Args:
        reference: ``[n, vocabulary]`` logits before the edit.
        logits: ``[n, vocabulary]`` logits after it.
    """
    kl: Tensor = _Divergence.apply(reference.detach(), logits)
    return kl


def token_squares(reference: Tensor, logits: Tensor) -> Tensor:
    """``mean over the vocabulary of (logit before - logit after)^2``, ``[n]``, in float32 at least.

    The reference carries no gradient.
    """
    return (_wide(logits) - _wide(reference.detach())).square().mean(-1)


def label_losses(
    logits: Tensor,
    targets: Tensor,
    before: Tensor,
    token_loss: TokenLoss = token_nll,
    locality_loss: TokenLoss = token_kl,
) -> tuple[Tensor, Tensor]:
    """Losses at the labels of targets (NLL) followed by the labels of locality texts (KL).

    Args:
        logits: ``[n + m, vocabulary]`` logits after the edit.
        targets: ``[n]`` labels of the targets.
        before: ``[m, vocabulary]`` logits of the locality labels before the edit.
        token_loss: the loss of a target's label.
        locality_loss: logits before and after the edit ``[m, vocabulary]`` -> the loss ``[m]`` of each locality label.

    Returns:
        Losses ``[n + m]``; and hits ``[n + m]``, whether the argmax is the target's label, or the argmax before.
    """
    at_targets, at_locality = logits.split([len(targets), len(before)])
    losses = torch.cat([token_loss(at_targets, targets), locality_loss(before, at_locality)])
    return losses, logits.detach().argmax(-1) == torch.cat([targets, before.argmax(-1)])


class _Divergence(torch.autograd.Function):
    """KL with an explicit gradient, which keeps two tensors of this size where autograd keeps seven."""

    @staticmethod
    def forward(ctx: Any, reference: Tensor, logits: Tensor) -> Tensor:
        before, after = _wide(reference).log_softmax(-1), _wide(logits).log_softmax(-1)
        share = before.exp()
        ctx.save_for_backward(share, after)
        ctx.dtype = logits.dtype
        return before.sub_(after).mul_(share).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        share, after = ctx.saved_tensors
        return None, after.exp().sub_(share).mul_(gradient[:, None]).to(ctx.dtype)


def _wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
