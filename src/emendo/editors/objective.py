"""The outer objective: losses and scores of a batch of edits, each on its own texts (MEND, Algorithm 1).

For every edit::

    L = c_edit * (p * NLL on the edit prompt + (1 - p) * NLL on the paraphrase)
        + c_loc * mean over locality texts of KL(before || after)                          with p = prompt_share

The loss depends on an editor only through its changes, so the edited passes run in micro-batches of similar length, and
memory does not grow with the number of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from emendo.low_rank import LowRank
from emendo.models._packing import Packing, applied_to_texts
from emendo.models.losses import TokenLoss, per_example, token_nll
from emendo.models.text import Text, TokenBatch, length_buckets

BUCKET_TOKENS = 768
"""Padded tokens of one pass through the edited blocks."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One edit and the texts of its losses.

    Attributes:
        edit: the prompt with its target.
        paraphrase: a paraphrase with the same target; the edit itself where the record has none.
        locality: texts whose answers must stay as they are.
        base: training sequences of the model's own task, with their true answers, for methods that train the model.
    """

    edit: Text
    paraphrase: Text
    locality: tuple[Text, ...]
    base: tuple[Text, ...] = ()

    def texts(self) -> tuple[Text, ...]:
        """Every text of the episode."""
        return (self.edit, self.paraphrase, *self.locality, *self.base)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of the outer losses.

    Attributes:
        c_edit: of the edit loss.
        prompt_share: share of the edit prompt in it; the paraphrase has the rest.
        c_loc: of the locality loss.
    """

    c_edit: float
    prompt_share: float = 0.5
    c_loc: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the episodes of a batch.

    Attributes:
        loss: what is differentiated, a mean over the episodes: ``c_edit * edit_loss`` plus ``c_loc`` times the mean
            locality loss of an episode's own texts, plus what the method adds.
        edit_loss: NLL in nats per target token, over edit prompt and paraphrase as weighted in the loss.
        locality_loss: KL(before || after) in nats per answer token, or the method's own locality loss.
        success: share of edits whose whole target is the argmax on the edit prompt.
        generalisation: the same on the paraphrase.
        locality: share of locality texts whose answer's argmax tokens are all unchanged.
    """

    loss: float
    edit_loss: float
    locality_loss: float
    success: float
    generalisation: float
    locality: float


class Passes(Protocol):
    """Forward passes of a model, with and without an edit; see :class:`emendo.models.trunk_cache.TrunkCache`."""

    @property
    def model(self) -> nn.Module:
        """The model whose matrices are edited."""

    def label_losses(
        self,
        texts: Sequence[Text],
        locality: int,
        context: Callable[[Packing], AbstractContextManager[None]],
        token_loss: TokenLoss,
    ) -> tuple[TokenBatch, Tensor, Tensor]:
        """Run texts as one batch in a context, such as an edit, and compute the losses at their labels.

        Args:
            texts: texts with targets, followed by the locality texts.
            locality: the number of locality texts; their loss is KL(without the context || in it).
            context: makes the context from the rows that the MLPs compute.
            token_loss: the loss of a target's label.

        Returns:
            The batch; the loss of each of its labels; and whether the argmax is the expected token.
        """


@dataclass(frozen=True, slots=True)
class _OuterText:
    """A text of one episode's loss; ``kind`` is 0 for the edit prompt, 1 for the paraphrase, 2 for locality."""

    episode: int
    text: Text
    kind: int
    weight: float


def _outer_texts(episodes: Sequence[Episode], weights: Weights) -> list[_OuterText]:
    outer = []
    for index, episode in enumerate(episodes):
        outer.append(_OuterText(index, episode.edit, 0, weights.c_edit * weights.prompt_share))
        outer.append(_OuterText(index, episode.paraphrase, 1, weights.c_edit * (1 - weights.prompt_share)))
        share = weights.c_loc / len(episode.locality)
        outer += [_OuterText(index, text, 2, share) for text in episode.locality]
    return outer


def _even_buckets(outer: Sequence[_OuterText]) -> list[list[_OuterText]]:
    """As few batches as the limit allows, of even size: each reads the whole vocabulary projection once."""

    def cut(tokens: int) -> list[list[_OuterText]]:
        return list(length_buckets(outer, lambda item: item.text.size, tokens))

    few = len(cut(BUCKET_TOKENS))
    low, high = 1, BUCKET_TOKENS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= few else (middle + 1, high)
    return cut(low)


def outer_losses(
    passes: Passes,
    deltas: Mapping[str, LowRank],
    episodes: Sequence[Episode],
    weights: Weights,
    *,
    together: int = 1,
    backward: bool = False,
    edit_loss: TokenLoss = token_nll,
) -> Outcome:
    """Compute losses and scores of each change on its own texts.

    Args:
        passes: forward passes of the model.
        deltas: by site, one change for every ``together`` episodes.
        episodes: the episodes that the changes were made from.
        weights: of the losses.
        together: number of consecutive episodes that share one change.
        backward: back-propagate the mean loss, micro-batch by micro-batch, to every tensor of the changes and of the
            model that requires a gradient.
        edit_loss: the loss of edit prompts and paraphrases at each label.
    """
    outer = _outer_texts(episodes, weights)
    total, losses = 0.0, [0.0, 0.0, 0.0]
    correct = [0.0, 0.0, 0.0]
    for part in _even_buckets(outer):
        part.sort(key=lambda item: item.kind)
        value, right = _bucket(passes, deltas, part, together, edit_loss)
        kinds = torch.tensor([item.kind for item in part])
        shares = value.new_tensor([item.weight for item in part])
        loss = value @ shares / len(episodes)
        if backward:
            loss.backward()
        total += float(loss.detach())
        for kind in range(3):
            losses[kind] += float(value.detach()[kinds == kind].sum())
            correct[kind] += float(right[kinds == kind].sum())
    count = len(episodes)
    kept = sum(item.kind == 2 for item in outer)
    edit = (weights.prompt_share * losses[0] + (1 - weights.prompt_share) * losses[1]) / count
    locality = losses[2] / kept
    return Outcome(
        loss=total,
        edit_loss=edit,
        locality_loss=locality,
        success=correct[0] / count,
        generalisation=correct[1] / count,
        locality=correct[2] / kept,
    )


def _bucket(
    passes: Passes,
    deltas: Mapping[str, LowRank],
    part: list[_OuterText],
    together: int,
    edit_loss: TokenLoss,
) -> tuple[Tensor, Tensor]:
    """Loss ``[texts]`` and all-tokens-right ``[texts]`` of some texts, each under its own change.

    The loss is NLL for edit prompts and paraphrases and KL against the unedited model for locality texts, which
    come last.
    """
    rows = torch.tensor([item.episode // together for item in part])
    batch, values, right = passes.label_losses(
        [item.text for item in part],
        sum(item.kind == 2 for item in part),
        lambda packing: applied_to_texts(passes.model, deltas, rows, packing),
        edit_loss,
    )
    owner = batch.owner.to(values.device)
    all_right = per_example(right.to(values), owner, len(part)).eq(1)
    return per_example(values, owner, len(part)), all_right.float().cpu()


def backward_through(
    deltas: Mapping[str, LowRank], losses: Callable[[Mapping[str, LowRank]], Outcome]
) -> Outcome:
    """Collect ``dL/d(change)`` with the changes as leaves, then back-propagate it once through their own graph.

    Args:
        deltas: the changes, with their graph.
        losses: computes the losses of detached changes and back-propagates to them.
    """
    leaves = {
        name: LowRank(*(factor.detach().requires_grad_(factor.requires_grad) for factor in (d.left, d.right)))
        for name, d in deltas.items()
    }
    outcome = losses(leaves)
    ends, gradients = [], []
    for name, delta in deltas.items():
        for end, leaf in ((delta.left, leaves[name].left), (delta.right, leaves[name].right)):
            if leaf.grad is not None:
                ends.append(end)
                gradients.append(leaf.grad)
    torch.autograd.backward(ends, gradients)
    return outcome
