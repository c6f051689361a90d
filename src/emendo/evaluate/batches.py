"""What is computed for many prompts at once and once only: trunk outputs and the clean model's continuations.

The batches are fixed beforehand, from all prompts of an evaluation, and each is computed when the first of its items
is needed. So an item's value never depends on what else was asked for before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from emendo.evaluate.cases import Case, by_budget
from emendo.models import LM
from emendo.store import TrunkStore
from emendo.texts import Text, length_buckets

_TRUNK_TOKENS = 512  # of a batch; the store's own batches are no smaller


class Lazy:
    """Batches of items, each computed when one of its items is asked for.

    Args:
        batches: the items, each in one batch.
        key: what makes two items the same.
        compute: does a batch.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[Any]],
        key: Callable[[Any], Hashable],
        compute: Callable[[Sequence[Any]], object],
    ) -> None:
        self._key, self._compute = key, compute
        self._batches = list(batches)
        self._open = {key(item): number for number, batch in enumerate(self._batches) for item in batch}

    def ensure(self, items: Iterable[Any]) -> None:
        """Compute the batches of these items that have not been computed yet."""
        for number in sorted({self._open[key] for item in items if (key := self._key(item)) in self._open}):
            self._compute(self._batches[number])
            for item in self._batches[number]:
                del self._open[self._key(item)]


def trunk_batches(store: TrunkStore, texts: Iterable[Text]) -> Lazy:
    """The trunk's outputs of these texts, those that the store does not keep yet."""
    missing = store.missing(texts)
    parts = length_buckets(missing, lambda text: len(text.trunk), _TRUNK_TOKENS)
    return Lazy(parts, lambda text: text.trunk, store.ensure)


class Continuations:
    """The clean model's continuations of all prompts but rewordings, once for each prompt.

    Args:
        lm: the clean model.
        cases: the prompts.
    """

    def __init__(self, lm: LM, cases: Iterable[Case]) -> None:
        self.lm = lm
        self.texts: dict[tuple[str, int], str] = {}
        wanted = {self._key(case): case for case in cases if self._wants(case)}
        self._lazy = Lazy(by_budget([*wanted.values()], lambda case: case), self._key, self._generate)

    def ensure(self, cases: Sequence[Case]) -> None:
        """Note the continuations in the cases."""
        asked = [case for case in cases if self._wants(case)]
        self._lazy.ensure(asked)
        for case in asked:
            case.found["text_before"] = self.texts[self._key(case)]

    def _generate(self, part: Sequence[Case]) -> None:
        texts = self.lm.generate([case.prompt for case in part], part[0].budget)
        self.texts |= {self._key(case): text for case, text in zip(part, texts, strict=True)}

    @staticmethod
    def _key(case: Case) -> tuple[str, int]:
        return case.prompt, case.budget

    @staticmethod
    def _wants(case: Case) -> bool:
        return case.kind != "paraphrase" and case.budget > 0
