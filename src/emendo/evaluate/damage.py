"""Damage that an edit does away from its fact: perplexity of plain text, general abilities, long continuations.

The perplexity is measured after every edit. The abilities and the continuations cost more and are measured after some
of the edits, evenly spaced. All are measured in the clean model too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from emendo.data.abilities import Choice
from emendo.errors import RequestError
from emendo.evaluate.edited_models import FORCED_TOKENS, EditedModels
from emendo.evaluate.metrics import mean_nll, ngram_entropy, repetition
from emendo.models.lm import LM
from emendo.models.losses import token_nll
from emendo.models.text import Text, length_buckets
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk_cache import TrunkCache

PASSAGE_TOKENS = 48
"""The number of tokens that are read of a passage; all but the first of them are scored."""


@dataclass(eq=False)
class Damage:
    """The measurements.

    Attributes:
        passages: plain texts for the perplexity.
        items: multiple-choice questions, for the abilities.
        openings: beginnings of texts, for long continuations.
        edits: the number of edits after which the abilities and the continuations are measured.
        long_tokens: the number of tokens of a continuation.
    """

    passages: Sequence[str] = ()
    items: Sequence[Choice] = ()
    openings: Sequence[str] = ()
    edits: int = 20
    long_tokens: int = 60
    _clean: dict[str, float] = field(default_factory=dict, init=False)
    _chosen: frozenset[int] = field(default=frozenset(), init=False)

    def begin(self, lm: LM, store: TrunkCache, edits: int) -> None:
        """Measure the clean model.

        Args:
            lm: the clean model, a decoder.
            store: the cache of trunk outputs; those of the passages and questions are added to it.
            edits: the number of edits that will follow.

        Raises:
            RequestError: the model does not continue texts, or an item does not fit it.
        """
        if lm.kind != "causal":
            raise RequestError(
                f"{lm.name} continues no texts; perplexity and abilities are for decoders: leave damage out."
            )
        self._texts = passage_texts(lm, self.passages, PASSAGE_TOKENS)
        pairs = [(item.prompt, option) for item in self.items for option in item.options]
        self._options = to_texts(lm, pairs)
        store.ensure([*self._texts, *self._options])
        few = min(self.edits, edits)
        self._chosen = frozenset(round(i * (edits - 1) / max(1, few - 1)) for i in range(few))
        nll = _clean(store, self._texts, _sum)
        scores = _clean(store, self._options, _nll)
        self._clean = self._perplexity(nll) | self._abilities(scores)
        if self.openings:
            self._clean |= _fluency(lm.generate(list(self.openings), self.long_tokens))

    def clean(self) -> Mapping[str, float]:
        """The clean model's values, by the same names."""
        return self._clean

    def measure(self, edited: EditedModels, edits: Sequence[int]) -> list[dict[str, float]]:
        """Measure several edits.

        Args:
            edited: the edits.
            edits: the number of each of them among all edits.

        Returns:
            For each edit, values by name.
        """
        everywhere = range(len(edits))
        seen = [self._perplexity(row) for row in self._under(edited, everywhere, self._texts, _sum)]
        closer = [row for row, edit in enumerate(edits) if edit in self._chosen]
        for row, scores in zip(closer, self._under(edited, closer, self._options, _nll), strict=True):
            seen[row] |= self._abilities(scores)
        if closer and self.openings:
            rows = [row for row in closer for _ in self.openings]
            texts = edited.generate(rows, [*self.openings] * len(closer), self.long_tokens)
            for place, row in enumerate(closer):
                each = len(self.openings)
                seen[row] |= _fluency(texts[place * each : (place + 1) * each])
        return seen

    def describe(self) -> dict[str, object]:
        """How it was measured, in words."""
        found: dict[str, object] = {}
        if self.passages:
            found["perplexity"] = (
                f"exp(NLL per token) over the first {PASSAGE_TOKENS} tokens of {len(self.passages)} plain passages, "
                "after every edit"
            )
        if self.items:
            found["abilities"] = (
                f"{len(self.items)} questions, the option of least NLL per token, after {len(self._chosen)} edits "
                "evenly spaced"
            )
        if self.openings:
            found["fluency"] = (
                f"n-gram entropy (bits) and repeated word trigrams of {len(self.openings)} greedy continuations of "
                f"{self.long_tokens} tokens, after the same edits"
            )
        return found

    def _under(
        self,
        edited: EditedModels,
        rows: Sequence[int],
        texts: Sequence[Text],
        value: Callable[[Tensor, Text], float],
    ) -> list[list[float]]:
        """For each row, the value of each text under its edit."""
        found: dict[tuple[int, int], float] = {}
        pairs = [(row, place) for row in rows for place in range(len(texts))]
        if not edited.shared:
            parts = [[pair for pair in pairs if pair[0] == row] for row in rows]
        else:
            parts = [*length_buckets(pairs, lambda pair: texts[pair[1]].size, FORCED_TOKENS)]
        for part in parts:
            logits = edited.logits([row for row, _ in part], [texts[place] for _, place in part])
            for pair, own in zip(part, logits, strict=True):
                found[pair] = value(own, texts[pair[1]])
        return [[found[row, place] for place in range(len(texts))] for row in rows]

    def _perplexity(self, nll: Sequence[float]) -> dict[str, float]:
        tokens = sum(len(text.labels) for text in self._texts)
        return {"perplexity": _exp(math.fsum(nll) / tokens)} if tokens else {}

    def _abilities(self, scores: Sequence[float]) -> dict[str, float]:
        """The share of questions answered correctly, in total and by family."""
        right: dict[str, list[bool]] = {}
        left = iter(scores)
        for item in self.items:
            own = [next(left) for _ in item.options]
            best = min(range(len(own)), key=lambda i: own[i] if own[i] == own[i] else math.inf)
            right.setdefault(item.family, []).append(best == item.right and math.isfinite(own[best]))
        found = {f"ability_{family}": fmean(values) for family, values in right.items()}
        return found | ({"ability": fmean(found.values())} if found else {})


def _clean(store: TrunkCache, texts: Sequence[Text], value: Callable[[Tensor, Text], float]) -> list[float]:
    """The value of each text under the clean model."""
    found = [0.0] * len(texts)
    for part in length_buckets(range(len(texts)), lambda place: texts[place].size, FORCED_TOKENS):
        _, logits = store.logits([texts[place] for place in part])
        for place, own in zip(part, logits.split([len(texts[i].labels) for i in part]), strict=True):
            found[place] = value(own, texts[place])
    return found


def _sum(logits: Tensor, text: Text) -> float:
    return float(token_nll(logits, torch.tensor(text.labels, device=logits.device)).sum())


def _nll(logits: Tensor, text: Text) -> float:
    labels = torch.tensor(text.labels, device=logits.device)
    return float(mean_nll(logits, labels, torch.zeros_like(labels), 1))


def _fluency(texts: Sequence[str]) -> dict[str, float]:
    return {
        "entropy": fmean(ngram_entropy(text) for text in texts),
        "repetition": fmean(repetition(text) for text in texts),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
