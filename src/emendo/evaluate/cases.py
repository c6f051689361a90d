"""The prompts of an evaluation, tokenised, and what is found out about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from emendo.data.batch import to_texts
from emendo.data.schema import Record
from emendo.evaluate.results import SCORES, Kind, Outcome
from emendo.models import LM
from emendo.texts import Text, length_buckets

T = TypeVar("T")

EXTRA_TOKENS, TOKEN_STEP = 4, 8
"""A prompt is continued by its answer's tokens and so many more, rounded up to a multiple of the second number."""

_GENERATED_TOKENS = 2048  # padded tokens of a batch, those to come included


@dataclass(slots=True)
class Case:
    """One prompt of a record, and what is found out about it."""

    kind: Kind
    text: Text
    prompt: str
    answer: str
    budget: int  # tokens to generate
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether the edit shall change nothing here."""
        return self.kind in SCORES["locality"]

    def outcome(self) -> Outcome:
        """What was found out, once it all has been."""
        return Outcome(self.kind, self.prompt, self.answer, **{"generated": None, **self.found})


def tokenise(lm: LM, records: Sequence[Record], new_tokens: int | None) -> list[list[Case]]:
    """The prompts of each record, the edit prompt first.

    Args:
        lm: the model that will read them.
        records: the records.
        new_tokens: how many tokens to generate; None gives each prompt its own number.

    Raises:
        RequestError: a text does not fit the model's context.
    """
    flat: list[tuple[int, Kind, str, str]] = []
    for index, record in enumerate(records):
        flat.append((index, "edit", record.prompt, record.target))
        flat += [(index, "paraphrase", prompt, record.target) for prompt in record.paraphrases]
        flat += [(index, "neighbour", probe.prompt, probe.answer) for probe in record.neighbours]
        flat += [(index, "unrelated", probe.prompt, probe.answer) for probe in record.unrelated]
    texts = to_texts(lm, [(prompt, answer) for *_, prompt, answer in flat])
    cases: list[list[Case]] = [[] for _ in records]
    for (index, kind, prompt, answer), text in zip(flat, texts, strict=True):
        budget = new_tokens or -(-(len(text.labels) + EXTRA_TOKENS) // TOKEN_STEP) * TOKEN_STEP
        if lm.context is not None and lm.kind == "causal":
            budget = min(budget, lm.context - text.start)
        cases[index].append(Case(kind, text, prompt, answer, budget))
    return cases


def by_budget(items: Sequence[T], case: Callable[[T], Case]) -> Iterator[list[T]]:
    """Batches for generation: one number of new tokens in each, and prompts of similar length."""

    def budget(item: T) -> int:
        return case(item).budget

    def length(item: T) -> int:
        return len(case(item).text.source) + case(item).text.start + case(item).budget

    for _, group in groupby(sorted(items, key=budget), key=budget):
        yield from length_buckets(list(group), length, _GENERATED_TOKENS)
