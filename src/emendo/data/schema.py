"""What a record is, what a problem in a file is, and how typed fields are taken out of raw JSON."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args, overload


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with its known answer, on which an edit should change nothing."""

    prompt: str
    answer: str


MALFORMED = "malformed"

ConsequenceKind = Literal["reversed", "one_hop", "two_hop", "alias"]
CONSEQUENCES: tuple[ConsequenceKind, ...] = get_args(ConsequenceKind)


@dataclass(frozen=True, slots=True)
class Consequence:
    """A prompt whose answer follows from an edit, and the answer that it shall have after it.

    The kind says how: the relation turned round, one or two further facts needed, or the subject under another name.
    """

    kind: ConsequenceKind
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Record:
    """One edit to make, with what is needed to train on it and to measure it."""

    prompt: str
    target: str
    subject: str | None = None
    relation: str | None = None
    id: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()  # same relation, other subject
    unrelated: tuple[Probe, ...] = ()
    answer: str | None = None  # the old or true answer, where known
    consequences: tuple[Consequence, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing in a file that is no record, or not one as it should be; `field` is empty when it is the whole line.

    `reason` is why in a word or two: ``malformed``, or why a well-formed case cannot be a record. `item` is which value
    of the file it belongs to, from 1; 0 where that is a line that cannot be parsed.
    """

    file: str
    line: int
    field: str
    expected: str
    found: str
    reason: str = MALFORMED
    item: int = 0

    def __str__(self) -> str:
        where = f"field '{self.field}': " if self.field else ""
        item = f" (item {self.item})" if self.item > self.line else ""  # of an array that stands on one line
        return f"{self.file}:{self.line}{item}: {where}expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class RecordSet(Sequence[Record]):
    """The records of one source, and what was left out when bad ones were to be skipped."""

    records: tuple[Record, ...]
    skipped: tuple[Problem, ...]
    source: str

    @property
    def reasons(self) -> dict[str, int]:
        """Why records were left out, each reason with the number of records; one with several counts by its first."""
        return count_reasons(self.skipped)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return self.records[index]


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """The number of records by the first problem's reason of each."""
    first: dict[tuple[int, int], str] = {}
    for problem in problems:
        first.setdefault((problem.line, problem.item), problem.reason)
    return dict(Counter(first.values()))


@dataclass(slots=True)
class Fields:
    """Takes typed fields out of one raw record and keeps a note of each field that is wrong.

    The notes are `(field, expected, found, reason)`. A method hands back an empty value for a wrong field, so
    that one pass finds every problem of a record.
    """

    raw: Mapping[str, object]
    notes: list[tuple[str, str, str, str]] = field(default_factory=list)

    def text(self, key: str) -> str:
        """A required text."""
        return self._text(key, self.raw.get(key), missing=key not in self.raw)

    def optional(self, key: str) -> str | None:
        """A text, or None where the field is absent or null."""
        return None if self.raw.get(key) is None else self.text(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where the field is absent or null."""
        items = self._list(key, "a list of non-empty texts")
        return tuple(self._text(f"{key}[{i}]", item) for i, item in enumerate(items))

    def probes(self, key: str) -> tuple[Probe, ...]:
        """A list of objects with `prompt` and `answer`; empty where the field is absent or null."""
        probes = []
        for i, item in enumerate(self._list(key, "a list of objects with 'prompt' and 'answer'")):
            if not isinstance(item, dict):
                self.note(f"{key}[{i}]", "an object with 'prompt' and 'answer'", describe(item))
                continue
            prompt, answer = (
                self._text(f"{key}[{i}].{part}", item.get(part), missing=part not in item)
                for part in ("prompt", "answer")
            )
            probes.append(Probe(prompt.rstrip(), answer.strip()))
        return tuple(probes)

    def consequences(self, key: str) -> tuple[Consequence, ...]:
        """A list of objects with `kind`, `prompt` and `answer`; empty where the field is absent or null."""
        probes = self.probes(key)
        found = []
        for i, (item, probe) in enumerate(zip(self._list(key, ""), probes, strict=False)):
            kind = item.get("kind") if isinstance(item, dict) else None
            if kind in CONSEQUENCES:
                found.append(Consequence(cast(ConsequenceKind, kind), probe.prompt, probe.answer))
            else:
                self.note(f"{key}[{i}].kind", f"one of {', '.join(CONSEQUENCES)}", describe(kind))
        return tuple(found)

    def pair(self, prompt_key: str, answer_key: str) -> tuple[Probe, ...]:
        """One probe from two fields that stand side by side; none where both are absent or null."""
        if self.raw.get(prompt_key) is None and self.raw.get(answer_key) is None:
            return ()
        return (Probe(self.text(prompt_key).rstrip(), self.text(answer_key).strip()),)

    def label(self, key: str) -> str | None:
        """A text or a whole number, as text; None where the field is absent or null."""
        value = self.raw.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.optional(key)

    def note(self, key: str, expected: str, found: str, reason: str = MALFORMED) -> None:
        """Keeps a problem of this record."""
        self.notes.append((key, expected, found, reason))

    def _list(self, key: str, expected: str) -> list[object]:
        value = self.raw.get(key)
        if value is None:
            return []
        if isinstance(value, list):
            return value
        self.note(key, expected, describe(value))
        return []

    def _text(self, key: str, value: object, missing: bool = False) -> str:
        if isinstance(value, str) and value.strip():
            return value
        self.note(key, "a non-empty text", "nothing" if missing else describe(value))
        return ""


def describe(value: object) -> str:
    """A JSON value in a few words, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        if not value.strip():
            return "only whitespace" if value else "an empty text"
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if isinstance(value, bool | int | float):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {str(value).lower()}"
    kind = "a list" if isinstance(value, list) else "an object"
    return f"{kind} of length {len(value)}" if isinstance(value, list | dict) else f"{value!r}"
