"""Records, the problems of a record file, and the set of records read from one source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, overload


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and its known answer, which an edit must not change."""

    prompt: str
    answer: str


ConsequenceKind = Literal["reversed", "one_hop", "two_hop", "alias"]
CONSEQUENCES: tuple[ConsequenceKind, ...] = get_args(ConsequenceKind)


@dataclass(frozen=True, slots=True)
class Consequence:
    """A prompt whose answer follows from an edit, and its answer after the edit; measured as portability.

    The kind says how it follows: by the reversed relation, by one or two further facts, or by another name of the
    subject.
    """

    kind: ConsequenceKind
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Record:
    """One edit to make, with the prompts to train it on and to measure it by.

    Attributes:
        prompt: the text right before the answer.
        target: the answer after the edit.
        subject: of the fact, as the prompt names it.
        relation: of the fact.
        id: a name.
        paraphrases: other wordings of the prompt.
        neighbours: prompts of the same relation about other subjects.
        unrelated: any other prompts that must not change.
        answer: the old or true answer.
        consequences: prompts whose answers follow from the edit.
        separator: the text between each of the prompts and its answer; None chooses it by the script
            (:func:`emendo.models.framing.separator`).
    """

    prompt: str
    target: str
    subject: str | None = None
    relation: str | None = None
    id: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    unrelated: tuple[Probe, ...] = ()
    answer: str | None = None
    consequences: tuple[Consequence, ...] = field(default=(), repr=False)
    separator: str | None = field(default=None, repr=False)

    def texts(self) -> tuple[tuple[str, str, str | None], ...]:
        """Every prompt of the record with the answer that belongs to it, and the separator."""
        return (
            (self.prompt, self.target, self.separator),
            *((prompt, self.target, self.separator) for prompt in self.paraphrases),
            *((probe.prompt, probe.answer, self.separator) for probe in (*self.neighbours, *self.unrelated)),
            *((one.prompt, one.answer, self.separator) for one in self.consequences),
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON values. Without a separator it is left out, so that older records keep their digests."""
        return {key: value for key, value in asdict(self).items() if key != "separator" or value is not None}


MALFORMED = "malformed"
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a value of a file is not a record.

    Attributes:
        file: its path.
        line: on which the value starts, from 1.
        field: of the record; empty for the whole value.
        expected: a description of valid values.
        found: a description of the value.
        reason: ``malformed``, or why a well-formed case cannot be a record, in a few words.
        item: the number of the value in the file, from 1.
    """

    file: str
    line: int
    field: str
    expected: str
    found: str
    reason: str = MALFORMED
    item: int = 0

    def __str__(self) -> str:
        where = f"field '{escaped(self.field)}': " if self.field else ""
        item = f" (item {self.item})" if self.item > self.line else ""  # of an array that stands on one line
        return f"{self.file}:{self.line}{item}: {where}expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class RecordSet(Sequence[Record]):
    """The records of one source.

    Attributes:
        held: the records; those of a large file stay in the file and are read whenever they are asked for.
        skipped: the problems of the records that were left out.
        source: the path, or ``"atlas"``.
        layout: the name of the file's layout.
        unused: fields that are not read, each with the number of records that have it.
        warnings: doubts about the records as a whole, such as two targets of one prompt.
        lines: on which each record starts; empty for the atlas.
    """

    held: Sequence[Record]
    skipped: tuple[Problem, ...]
    source: str
    layout: str = "emendo"
    unused: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    lines: Sequence[int] = field(default=(), repr=False)

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in memory."""
        return tuple(self.held)

    @property
    def reasons(self) -> dict[str, int]:
        """Why records were left out: each reason with its number of records, by the first problem of each."""
        return count_reasons(self.skipped)

    def place(self, index: int) -> str:
        """Where a record stands, as ``file:line``."""
        return f"{self.source}:{self.lines[index]}" if self.lines else f"{self.source}, record {index + 1}"

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.held)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return tuple(self.held[index]) if isinstance(index, slice) else self.held[index]


def escaped(name: str) -> str:
    """A name from a file as it may be shown: special characters as in Python's ``repr``, a long one cut."""
    return repr(name[:_LONGEST_NAME])[1:-1] + "..." * (len(name) > _LONGEST_NAME)


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """The number of records by the first problem's reason of each."""
    first: dict[tuple[int, int], str] = {}
    for problem in problems:
        first.setdefault((problem.line, problem.item), problem.reason)
    return dict(Counter(first.values()))
