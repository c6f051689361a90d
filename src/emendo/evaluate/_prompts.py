"""The prompts of an evaluation, tokenised, with the findings about each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from emendo.data.schema import Probe, Record
from emendo.edits import Request
from emendo.errors import RequestError
from emendo.evaluate.results import LOCAL, Kind, Outcome
from emendo.models.framing import joined
from emendo.models.lm import LM
from emendo.models.text import Text, length_buckets
from emendo.models.tokenization import to_texts

T = TypeVar("T")

EXTRA_TOKENS, TOKEN_STEP = 4, 8
"""The number of generated tokens: that of the answer plus the first, rounded up to a multiple of the second."""

_GENERATED_TOKENS = 2048  # padded tokens of a batch, generated ones included


@dataclass(slots=True)
class PromptCase:
    """One prompt of a record, and the findings about it.

    Attributes:
        kind: of the prompt.
        text: the prompt with its answer, tokenised.
        prompt: the prompt.
        answer: the expected answer.
        budget: the number of tokens to generate; 0 for none.
        other: the competing answer.
        other_text: the prompt with the competing answer, tokenised.
        found: fields of the outcome, as they become known.
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
        """Whether the edit must change nothing here."""
        return self.kind in LOCAL

    @property
    def one_pass(self) -> bool:
        """Whether the competing answer is one token (or class), to be read off where the answer begins."""
        text, other = self.text, self.other_text
        return other is not None and len(other.labels) == 1 and other.inputs == text.ids[: text.start]

    def texts(self) -> tuple[Text, ...]:
        """The texts of its forward passes."""
        own = (self.text,)
        return own if self.other_text is None or self.one_pass else (*own, self.other_text)

    def outcome(self) -> Outcome:
        """The findings, once all are known."""
        return Outcome(
            self.kind, self.prompt, self.answer, **{"generated": None, "other": self.other, **self.found}
        )


class _Prompt(NamedTuple):
    kind: Kind
    prompt: str
    answer: str
    other: str | None
    separator: str | None


def request_of(record: Record) -> Request:
    """The edit of a record."""
    return Request(record.prompt, record.target, record.separator)


def describe_framing(lm: LM, records: Iterable[Record]) -> str:
    """How the model reads the prompts of some records, in words."""
    counts = Counter(record.separator for record in records)
    own = [f"{text!r} before the answer" for text in counts if text is not None]
    some = f" of {counts.total() - counts[None]} of {counts.total()} records" if counts[None] and own else ""
    return ", ".join([lm.framing.description, *own]) + some


def tokenise(
    lm: LM, records: Sequence[Record], new_tokens: int | None, *, fact_in_context: bool = True
) -> list[list[PromptCase]]:
    """The prompts of each record, the edit prompt first.

    Args:
        lm: the model that will read them.
        records: the records.
        new_tokens: the number of tokens to generate; None chooses it for each prompt.
        fact_in_context: add the neighbours (or else the unrelated prompts) with the edited fact before them; not for
            classifiers.

    Raises:
        RequestError: a text does not fit the model's context.
    """
    in_context = fact_in_context and lm.kind != "classifier"
    rows = [_prompts(lm, record, in_context) for record in records]
    flat = [prompt for row in rows for prompt in row]
    texts = iter(to_texts(lm, [(one.prompt, one.answer, one.separator) for one in flat]))
    others = iter(to_texts(lm, [(one.prompt, one.other, one.separator) for one in flat if one.other]))
    return [[_case(lm, prompt, next(texts), others, new_tokens) for prompt in row] for row in rows]


def _prompts(lm: LM, record: Record, fact_in_context: bool) -> list[_Prompt]:
    old = _competing(lm, record.answer, record.target)
    between = record.separator
    rows = [_Prompt("edit", record.prompt, record.target, old, between)]
    rows += [_Prompt("paraphrase", prompt, record.target, old, between) for prompt in record.paraphrases]
    kinds: tuple[tuple[Kind, tuple[Probe, ...]], ...] = (
        ("neighbour", record.neighbours),
        ("unrelated", record.unrelated),
    )
    for kind, probes in kinds:
        rows += [
            _Prompt(kind, p.prompt, p.answer, _competing(lm, record.target, p.answer), between)
            for p in probes
        ]
    rows += [_Prompt(c.kind, c.prompt, c.answer, None, between) for c in record.consequences]
    for probe in (record.neighbours or record.unrelated) if fact_in_context else ():
        prompt = with_fact(record, probe.prompt)
        if _fits(lm, prompt, between, probe.answer, record.target):
            other = _competing(lm, record.target, probe.answer)
            rows.append(_Prompt("told", prompt, probe.answer, other, between))
    return rows


def with_fact(record: Record, prompt: str) -> str:
    """A prompt with the edited fact as a sentence before it, as in CounterFact+ (Hoelscher-Obermaier et al., 2023)."""
    return f"{joined(*request_of(record).pair).rstrip()}. {prompt}"


def _fits(lm: LM, prompt: str, between: str | None, *answers: str) -> bool:
    """Whether a prompt with each of the answers fits the context; a prompt with the fact in context may be left out."""
    if lm.context is None:
        return True
    try:
        to_texts(lm, [(prompt, answer, between) for answer in answers])
    except RequestError:
        return False
    return True


def _competing(lm: LM, other: str | None, answer: str) -> str | None:
    """The competing answer, unless it is the same one, or one that the model cannot give."""
    if other is None or not other.strip() or other.strip() == answer.strip():
        return None
    possible = lm.kind != "classifier" or other.strip().casefold() in map(str.casefold, lm.labels)
    return other if possible else None


def _case(lm: LM, row: _Prompt, text: Text, others: Iterator[Text], new_tokens: int | None) -> PromptCase:
    budget = new_tokens or -(-(len(text.labels) + EXTRA_TOKENS) // TOKEN_STEP) * TOKEN_STEP
    if lm.context is not None and lm.kind == "causal":
        budget = min(budget, lm.context - text.start)
    budget = 0 if row.kind == "told" else budget
    other_text = next(others) if row.other else None
    return PromptCase(row.kind, text, row.prompt, row.answer, budget, row.other, other_text)


def by_budget(items: Sequence[T], case: Callable[[T], PromptCase]) -> Iterator[list[T]]:
    """Batches for generation: in each one number of new tokens, and prompts of similar length."""

    def budget(item: T) -> int:
        return case(item).budget

    def length(item: T) -> int:
        return len(case(item).text.source) + case(item).text.start + case(item).budget

    for _, group in groupby(sorted(items, key=budget), key=budget):
        yield from length_buckets(list(group), length, _GENERATED_TOKENS)
