"""The editors that turn the factors of the fine-tuning gradient into a change, and can be trained to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from emendo.editors.base import Editor
from emendo.editors.objective import Episode, Outcome, Weights, backward_through, judge
from emendo.edits.edit import Request
from emendo.low_rank import LowRank
from emendo.models._packing import Packing
from emendo.models._projection_loss import Expected, divergence
from emendo.models.capture import Factors, all_finite, capture, move
from emendo.models.lm import LM
from emendo.models.losses import TokenLoss, per_example, token_nll
from emendo.models.sites import Site
from emendo.models.text import Text, TokenBatch, collate, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_TOKENS = 256
"""Padded tokens of the texts that are edited together: the memory that many requests take hangs on it."""


class GradientEditor(Editor):
    """Base of the editors that turn the factors of the fine-tuning gradient into a change, and can be trained to."""

    looks_ahead: bool = True
    """Whether the factors are those of a frozen model, so that they can be taken before they are needed."""

    @abstractmethod
    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """The method itself.

        Args:
            factors: by site name, the rows of all examples.

        Returns:
            By site name, one change for each example, differentiable in what the editor learns.
        """

    def factors(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None = None
    ) -> dict[str, Factors]:
        """The factors that this editor works on, on its own device; see :func:`edit_factors`."""
        device = next((p.device for p in self.parameters()), None)
        factors = edit_factors(trunk, self.sites, texts, hidden, packed=True)
        return factors if device is None else move(factors, device)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, in batches of similar length."""
        parts = list(self._changes(lm, requests))
        if len(parts) == 1:
            return parts[0][1]
        order = torch.tensor([place for places, _ in parts for place in places]).argsort()
        return {name: _joined([changes[name] for _, changes in parts], order) for name in parts[0][1]}

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The sum of the requests' own changes, in memory that does not grow with their number.

        Where the factors would take more room than the matrix itself, the change is kept as a matrix.
        """
        sums: dict[str, _Sum] = {}
        for _, changes in self._changes(lm, requests):
            for name, change in changes.items():
                sums.setdefault(name, _Sum()).add(change.sum())
        return {name: own.change() for name, own in sums.items()}

    @torch.no_grad()
    def _changes(self, lm: LM, requests: Sequence[Request]) -> Iterator[tuple[list[int], dict[str, LowRank]]]:
        """Places of some requests and the change of each, until all had their turn."""
        texts = self.texts(lm, requests)
        trunk = Trunk(self.host(lm).model, self.sites)
        training = self.training
        self.eval()
        try:
            for part in in_batches(texts):
                yield part, self(self.factors(trunk, [texts[place] for place in part]))
        finally:
            self.train(training)

    # ------------------------------------------------------------------------------------- training

    def begin(self, lm: LM) -> None:
        """Get ready to be trained on this model."""

    def trainable(self, lm: LM) -> Iterable[nn.Parameter]:
        """What training changes: the editor's own parameters."""
        return self.parameters()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; a method with learning rates of its own overrides this."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def weights(self, asked: Weights) -> Weights:
        """The weights of the losses at this step: those asked for, unless a method sets its own."""
        return asked

    def learnt(self, outcome: Outcome) -> None:
        """Hear what a step gave, after it."""

    def validated(self, outcome: Outcome) -> None:
        """Hear what a validation gave."""

    def judged(
        self,
        store: TrunkCache,
        episodes: Sequence[Episode],
        factors: Mapping[str, Factors],
        weights: Weights,
        *,
        together: int = 1,
        backward: bool = False,
    ) -> Outcome | None:
        """Make the edits of some episodes and judge them; with ``backward`` also add to the parameters' gradients.

        Args:
            store: the trunk's output of every text, and the way on from there; the unedited model's answers.
            episodes: what to edit and to judge by.
            factors: of the episodes' edits; empty where :attr:`looks_ahead` is False.
            weights: of the losses.
            together: how many consecutive episodes are put into one edit.
            backward: whether this is a training step.

        Returns:
            What the edits did; None where a factor was not finite.
        """
        if factors and not all_finite(row for f in factors.values() for row in (f.u, f.delta)):
            return None
        deltas = self(factors)
        if together > 1:
            deltas = {name: delta.group(together) for name, delta in deltas.items()}
        rest = (episodes, weights)
        if not backward:
            return judge(store, deltas, *rest, together=together)
        return backward_through(
            deltas, lambda leaves: judge(store, leaves, *rest, together=together, backward=True)
        )


def in_batches(texts: Sequence[Text], tokens: int = _TOKENS) -> list[list[int]]:
    """The texts' places in batches of at most so many padded tokens: all in order where they fit, else by length."""
    places = list(range(len(texts)))
    if max(text.size for text in texts) * len(texts) <= tokens:
        return [places]
    return list(length_buckets(places, lambda place: texts[place].size, tokens))


class _Sum:
    """A sum of changes of one matrix: as factors, and as a matrix as soon as that takes less room."""

    def __init__(self) -> None:
        self.factors: LowRank | None = None
        self.dense: Tensor | None = None

    def add(self, change: LowRank) -> None:
        if self.dense is not None:
            self.dense.addmm_(change.left, change.right)
            return
        self.factors = change if self.factors is None else self.factors + change
        d_out, d_in = self.factors.left.shape[0], self.factors.right.shape[1]
        if self.factors.rank * (d_out + d_in) > d_out * d_in + min(d_out, d_in) ** 2:
            self.dense, self.factors = self.factors.dense(), None

    def change(self) -> LowRank:
        """The sum."""
        if self.dense is not None:
            return LowRank.from_dense(self.dense)
        assert self.factors is not None
        return self.factors


def _joined(parts: Sequence[LowRank], order: Tensor) -> LowRank:
    """The changes ``[examples, ...]`` of all parts as one, in this order; lower ranks are filled up with zeros."""
    rank = max(part.rank for part in parts)
    left = torch.cat([pad(part.left, (0, rank - part.rank)) for part in parts])
    right = torch.cat([pad(part.right, (0, 0, 0, rank - part.rank)) for part in parts])
    return LowRank(left[order], right[order])


def edit_factors(
    trunk: Trunk,
    sites: tuple[Site, ...],
    texts: Sequence[Text],
    hidden: Tensor | None = None,
    *,
    token_loss: TokenLoss = token_nll,
    create_graph: bool = False,
    seen: Callable[[Tensor, TokenBatch], None] | None = None,
    packed: bool = False,
) -> dict[str, Factors]:
    """The factors of each text's own fine-tuning gradient: NLL of its answer, averaged over its tokens.

    Args:
        trunk: the split model.
        sites: where to capture.
        texts: prompts with their targets.
        hidden: the trunk's output ``[texts, tokens, width]``, where it is already known.
        token_loss: the loss of each label, in place of the NLL.
        create_graph: leave the factors differentiable in the model's parameters.
        seen: shown the logits at the label positions and the batch, on the way.
        packed: leave out the rows that do not matter; not where each example has a change of its own.
    """
    batch = collate(texts)
    packing = trunk.packing(batch) if packed else Packing()
    # one batch alone costs no more with its logits than finding out that they are not needed
    plain = hidden is not None and token_loss is token_nll and seen is None and not create_graph
    head = trunk.projection if plain else None
    if hidden is None and not create_graph:
        hidden = trunk.run(batch)

    def loss() -> Tensor:
        if head is not None:
            values, _ = divergence(
                head, trunk.projection_input(batch, hidden, packing), Expected.from_labels(head, batch.labels)
            )
        else:
            logits = trunk.logits(batch, hidden, packing)
            if seen is not None:
                seen(logits.detach(), batch)
            values = token_loss(logits, batch.labels.to(logits.device))
        return per_example(values, batch.owner.to(values.device), len(texts))

    owners = {name: rows.owner for name, rows in packing.sites.items()}
    return capture(trunk.model, sites, loss, create_graph=create_graph, owners=owners)[1]
