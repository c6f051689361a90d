"""Editors that turn the factors of the fine-tuning gradient into a change and are trained to do so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from emendo.editors.base import Editor
from emendo.editors.objective import (
    BUCKET_TOKENS,
    Episode,
    Outcome,
    Weights,
    backward_through,
    outer_losses,
)
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
"""Padded tokens of the texts that are edited in one batch; it bounds the memory of many requests."""

Ahead = dict[str, Factors]
"""By site, the factors of the edits of one batch of episodes."""


class GradientEditor(Editor):
    """Base of the trainable editors that turn the factors of the fine-tuning gradient into a change.

    A method defines :meth:`forward`; everything else has a default.
    """

    @property
    def first_token(self) -> float:
        """The share of the row of a text's first token in a change."""
        return 1.0

    @abstractmethod
    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """The equations of the method.

        Args:
            factors: by site name, the rows of all examples.

        Returns:
            By site name, one change for each example, differentiable in the editor's parameters.
        """

    def factors(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None = None
    ) -> dict[str, Factors]:
        """The input of :meth:`forward` for some texts, on the editor's device; see :func:`edit_factors`."""
        device = next((p.device for p in self.parameters()), None)
        factors = edit_factors(trunk, self.sites, texts, hidden, packed=True, first_token=self.first_token)
        return factors if device is None else move(factors, device)

    def changes(self, trunk: Trunk, texts: Sequence[Text]) -> dict[str, LowRank]:
        """One change of the host for each text, from one batch."""
        changes: dict[str, LowRank] = self(self.factors(trunk, texts))
        return changes

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, in batches of similar length."""
        parts = list(self._batches(lm, requests))
        if len(parts) == 1:
            return parts[0][1]
        order = torch.tensor([place for places, _ in parts for place in places]).argsort()
        return {name: _joined([changes[name] for _, changes in parts], order) for name in parts[0][1]}

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute the sum of the requests' separate changes, in memory that does not grow with their number.

        Where the factors would take more memory than the matrix itself, the change is kept as a matrix.
        """
        sums: dict[str, _Sum] = {}
        for _, changes in self._batches(lm, requests):
            for name, change in changes.items():
                sums.setdefault(name, _Sum()).add(change.sum())
        return {name: own.change() for name, own in sums.items()}

    @torch.no_grad()
    def _batches(self, lm: LM, requests: Sequence[Request]) -> Iterator[tuple[list[int], dict[str, LowRank]]]:
        """The indices of the requests of each batch, with their changes."""
        texts = self.texts(lm, requests)
        trunk = Trunk(self.host(lm).model, self.sites)
        training = self.training
        self.eval()
        try:
            for part in in_batches(texts):
                yield part, self.changes(trunk, [texts[place] for place in part])
        finally:
            self.train(training)

    # ------------------------------------------------------------------------------------- training

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; a method with its own learning rates overrides this."""
        return [{"params": list(self.parameters()), "lr": lr}]

    @property
    def base_texts(self) -> int:
        """How many training sequences of the model's own task an episode has; most methods need none."""
        return 0

    @property
    def observes(self) -> int:
        """How many training facts :meth:`observe` must see before training; most methods need none."""
        return 0

    def observe(self, factors: Mapping[str, Factors]) -> None:
        """Take statistics of the factors of some training facts, each seen once; most methods take none."""

    def observe_texts(self, store: TrunkCache, texts: Sequence[Text]) -> None:
        """Observe the factors of the edits of some texts, whose trunk outputs are in the store."""
        self.observe(self._factors_of(store, [texts])[0])

    def look_ahead(
        self, store: TrunkCache, batches: Sequence[Sequence[Episode]], window: Sequence[Episode] = ()
    ) -> list[Ahead]:
        """Compute, for several steps at once, everything that does not depend on the editor's parameters.

        The factors of the edits and the unedited model's answers to the locality texts stay the same while the editor
        learns. Texts of several steps make batches of similar length, which halves the padding and keeps the matrix
        products large. The answers are kept in the store.

        Args:
            store: holds the trunk's output of every text.
            batches: the episodes of the next steps.
            window: the episodes of further steps whose unedited answers are computed now.

        Returns:
            The factors of each batch.
        """
        for episodes in (window, [episode for batch in batches for episode in batch]):
            store.ensure_unedited(text for episode in episodes for text in episode.locality)
        return self._factors_of(store, [[episode.edit for episode in batch] for batch in batches])

    def _factors_of(self, store: TrunkCache, batches: Sequence[Sequence[Text]]) -> list[Ahead]:
        """Capture in batches of similar length, then give each batch its own rows, in its own order."""
        texts = [text for batch in batches for text in batch]
        found: dict[str, list[Factors]] = {}
        for part in length_buckets(range(len(texts)), lambda i: texts[i].size, BUCKET_TOKENS):
            chosen = [texts[i] for i in part]
            for name, rows in self.factors(store.trunk, chosen, store.gather(chosen)).items():
                owner = torch.tensor(part).to(rows.owner)[rows.owner]
                found.setdefault(name, []).append(Factors(rows.u, rows.delta, owner, len(texts), rows.share))
        if not texts:
            found = {site.name: [Factors.empty(*site.shape)] for site in self.sites}
        bounds = torch.tensor([0, *(len(batch) for batch in batches)]).cumsum(0).tolist()
        split: list[Ahead] = [{} for _ in batches]
        for name in list(found):
            parts = found.pop(name)  # its memory is freed once the parts are concatenated
            joined = Factors.concatenate(parts, len(texts))
            cuts = torch.searchsorted(joined.owner, torch.tensor(bounds).to(joined.owner)).tolist()
            for i, rows_of in enumerate(split):
                u, delta, owner, share = joined.rows(slice(cuts[i], cuts[i + 1]))
                rows_of[name] = Factors(u, delta, owner - bounds[i], len(batches[i]), share)
        return split

    def outer_step(
        self,
        store: TrunkCache,
        episodes: Sequence[Episode],
        ahead: Ahead,
        weights: Weights,
        *,
        together: int = 1,
        backward: bool = False,
    ) -> Outcome | None:
        """Make the edits of a batch of episodes and compute their losses and scores.

        Args:
            store: the trunk's output of every text, and the unedited model's answers.
            episodes: the batch.
            ahead: the result of :meth:`look_ahead` for the batch.
            weights: of the losses.
            together: number of consecutive episodes that make one edit.
            backward: add the gradient of the mean loss to the parameters' gradients.

        Returns:
            Losses and scores; None where a factor is not finite.
        """
        if not all_finite(row for f in ahead.values() for row in (f.u, f.delta)):
            return None
        together = self.facts_in_an_edit(len(episodes), together)
        deltas = self(ahead) if together == 1 else self.grouped(ahead, together)
        losses = partial(
            outer_losses, store, episodes=episodes, weights=weights, together=together, backward=backward
        )
        return backward_through(deltas, losses) if backward else losses(deltas)

    def grouped(self, factors: Mapping[str, Factors], together: int) -> dict[str, LowRank]:
        """One change for every ``together`` consecutive examples: by default the sum of theirs."""
        return {name: delta.group(together) for name, delta in self(factors).items()}

    def facts_in_an_edit(self, episodes: int, together: int) -> int:
        """The number of facts of the edits of a step, a divisor of ``episodes``: by default what was asked for."""
        return together

    def adapt(self, outcome: Outcome, *, validation: bool = False) -> None:
        """Adapt the objective after a step, or after a validation, to its outcome; most methods do nothing."""


def in_batches(texts: Sequence[Text], tokens: int = _TOKENS) -> list[list[int]]:
    """The texts' indices in batches of at most ``tokens`` padded tokens: in order where all fit, else by length."""
    places = list(range(len(texts)))
    if max(text.size for text in texts) * len(texts) <= tokens:
        return [places]
    return list(length_buckets(places, lambda place: texts[place].size, tokens))


class _Sum:
    """A sum of changes of one matrix: kept as factors, or as a matrix once that takes less memory."""

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
    """Concatenate changes ``[examples, ...]`` and reorder them; lower ranks are padded with zeros."""
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
    first_token: float = 1.0,
) -> dict[str, Factors]:
    """Compute the factors of each text's fine-tuning gradient: NLL of its answer, averaged over its tokens.

    Args:
        trunk: the split model.
        sites: where to capture.
        texts: prompts with their targets.
        hidden: the trunk's output ``[texts, tokens, width]``, if it is already known.
        token_loss: the loss of each label, in place of the NLL.
        create_graph: leave the factors differentiable in the model's parameters.
        seen: called with the logits at the label positions and the batch.
        packed: leave out irrelevant rows; not possible where each example has its own change.
        first_token: share of the row of a text's first token in a change; for decoders.
    """
    batch = collate(texts)
    packing = trunk.packing(batch) if packed else Packing()
    # for a single batch, computing the logits costs no more than finding out whether they are needed
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
    shares = None
    if first_token != 1 and batch.source_ids is None:
        share = torch.ones(batch.input_ids.shape)
        share[:, 0] = first_token
        kept = packing.sites
        shares = {
            site.name: share.flatten()[kept[site.name].index] if site.name in kept else share.flatten()
            for site in sites
        }
    return capture(trunk.model, sites, loss, create_graph=create_graph, owners=owners, shares=shares)[1]
