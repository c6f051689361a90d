"""The prompts of an evaluation, tokenised, and what is found out about each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from emendo.data.schema import Probe, Record
from emendo.errors import RequestError
from emendo.evaluate.results import LOCAL, Kind, Outcome
from emendo.models.lm import LM
from emendo.models.text import Text, length_buckets
from emendo.models.tokenization import to_texts
from emendo.models.trunk_cache import TrunkCache

T = TypeVar("T")

EXTRA_TOKENS, TOKEN_STEP = 4, 8
"""A prompt is continued by its answer's tokens and so many more, rounded up to a multiple of the second number."""

_GENERATED_TOKENS = 2048  # padded tokens of a batch, those to come included


@dataclass(slots=True)
class Case:
    """One prompt of a record, and what is found out about it.

    Attributes:
        kind: of the prompt.
        text: the prompt with its answer.
        prompt: in words.
        answer: in words.
        budget: tokens to generate; 0 where nothing is to be generated.
        other: the answer that it stands against, in words.
        other_text: the prompt with that.
        found: fields of the outcome.
    """

    kind: Kind
    text: Text
    prompt: str
    answer: str
    budget: int
    other: str | None = None
    other_text: Text | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether the edit shall change nothing here."""
        return self.kind in LOCAL

    @property
    def shares(self) -> bool:
        """Whether the other answer is one token (or class) that is to be read off where the answer begins."""
        text, other = self.text, self.other_text
        return other is not None and len(other.labels) == 1 and other.inputs == text.ids[: text.start]

    def texts(self) -> tuple[Text, ...]:
        """What must be read for it."""
        own = (self.text,)
        return own if self.other_text is None or self.shares else (*own, self.other_text)

    def outcome(self) -> Outcome:
        """What was found out, once it all has been."""
        return Outcome(
            self.kind, self.prompt, self.answer, **{"generated": None, "other": self.other, **self.found}
        )


_Asked = tuple[Kind, str, str, "str | None"]
"""Kind, prompt, answer, other answer."""


def tokenise(
    lm: LM, records: Sequence[Record], new_tokens: int | None, *, told: bool = True
) -> list[list[Case]]:
    """The prompts of each record, the edit prompt first.

    Args:
        lm: the model that will read them.
        records: the records.
        new_tokens: how many tokens to generate; None gives each prompt its own number.
        told: ask the prompts where nothing shall change also with the edited fact before them; a classifier's are not.

    Raises:
        RequestError: a text does not fit the model's context.
    """
    asked = [_prompts(lm, record, told and lm.kind != "classifier") for record in records]
    flat = [prompt for row in asked for prompt in row]
    texts = iter(to_texts(lm, [(prompt, answer) for _, prompt, answer, _ in flat]))
    others = iter(to_texts(lm, [(prompt, other) for _, prompt, _, other in flat if other]))
    return [[_case(lm, row, next(texts), others, new_tokens) for row in rows] for rows in asked]


def _prompts(lm: LM, record: Record, told: bool) -> list[_Asked]:
    old = _unlike(lm, record.answer, record.target)
    rows: list[_Asked] = [("edit", record.prompt, record.target, old)]
    rows += [("paraphrase", prompt, record.target, old) for prompt in record.paraphrases]
    kinds: tuple[tuple[Kind, tuple[Probe, ...]], ...] = (
        ("neighbour", record.neighbours),
        ("unrelated", record.unrelated),
    )
    for kind, probes in kinds:
        rows += [(kind, p.prompt, p.answer, _unlike(lm, record.target, p.answer)) for p in probes]
    rows += [(c.kind, c.prompt, c.answer, None) for c in record.consequences]
    for probe in (record.neighbours or record.unrelated) if told else ():
        prompt = tell(record, probe.prompt)
        if _fits(lm, prompt, probe.answer, record.target):
            rows.append(("told", prompt, probe.answer, _unlike(lm, record.target, probe.answer)))
    return rows


def tell(record: Record, prompt: str) -> str:
    """A prompt with the edited fact as a sentence before it."""
    return f"{record.prompt.rstrip()} {record.target.strip()}. {prompt}"


def _fits(lm: LM, prompt: str, *answers: str) -> bool:
    """Whether there is room for a prompt with its answers; one that is only asked beside others may be left out."""
    if lm.context is None:
        return True
    try:
        to_texts(lm, [(prompt, answer) for answer in answers])
    except RequestError:
        return False
    return True


def _unlike(lm: LM, other: str | None, answer: str) -> str | None:
    """The other answer, unless it is the same, or none that the model can give."""
    if other is None or not other.strip() or other.strip() == answer.strip():
        return None
    named = lm.kind != "classifier" or other.strip().casefold() in map(str.casefold, lm.labels)
    return other if named else None


def _case(lm: LM, row: _Asked, text: Text, others: Iterator[Text], new_tokens: int | None) -> Case:
    kind, prompt, answer, other = row
    budget = new_tokens or -(-(len(text.labels) + EXTRA_TOKENS) // TOKEN_STEP) * TOKEN_STEP
    if lm.context is not None and lm.kind == "causal":
        budget = min(budget, lm.context - text.start)
    budget = 0 if kind == "told" else budget
    return Case(kind, text, prompt, answer, budget, other, next(others) if other else None)


def by_budget(items: Sequence[T], case: Callable[[T], Case]) -> Iterator[list[T]]:
    """Batches for generation: one number of new tokens in each, and prompts of similar length."""

    def budget(item: T) -> int:
        return case(item).budget

    def length(item: T) -> int:
        return len(case(item).text.source) + case(item).text.start + case(item).budget

    for _, group in groupby(sorted(items, key=budget), key=budget):
        yield from length_buckets(list(group), length, _GENERATED_TOKENS)


# --------------------
# What is computed for many prompts at once and once only: trunk outputs and the clean model's continuations.
#
# The batches are fixed beforehand, from all prompts of an evaluation, and each is computed when the first of its items
# is needed. So an item's value never depends on what else was asked for before it.

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


def trunk_batches(store: TrunkCache, texts: Iterable[Text]) -> Lazy:
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
