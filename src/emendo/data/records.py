"""Reading records from a file or from the built-in facts, and writing them as JSON Lines."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from emendo._text import normalised
from emendo.data import _reader, atlas
from emendo.data._fields import describe
from emendo.data._layouts import KNOWN, Layout, find_layout, prompt_field
from emendo.data._reader import Raw
from emendo.data.schema import Consequence, Probe, Problem, Record, RecordSet, count_reasons, escaped
from emendo.errors import DataError, StorageError

__all__ = [
    "Consequence",
    "Probe",
    "Problem",
    "Record",
    "RecordSet",
    "RecordStream",
    "read_records",
    "stream_records",
    "write_records",
]

ATLAS = "atlas"
"""The source that stands for the built-in facts."""
LARGE_FILE = 1 << 25
"""Bytes from which the records of a file stay in the file."""

_SHOWN = 10  # problems in an error message
_MOST_PROBLEMS = 1000  # after which a file is given up, if its problems are an error


def read_records(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    need_paraphrase: bool = False,
) -> RecordSet:
    """Read the records of a file, or of the built-in facts.

    The whole file is checked, up to the limit. The records of a file above 32 MiB are not kept in memory but read
    again whenever they are asked for, unless it is a table or one object of lists.

    Args:
        source: ``"atlas"`` for the built-in facts, the path of a file (``"./atlas"`` for one of that name), or ``"-"``
            for standard input.
        split: a part of the built-in facts (``"train"``, ``"validation"`` or ``"test"``); None for all of them.
        limit: stop after this many records; the rest of the file is not read.
        skip_bad: leave records with problems out and list the problems in ``RecordSet.skipped``.
        need_paraphrase: whether a record without a paraphrase has a problem.

    Raises:
        DataError: the file is missing, unreadable, empty or of an unknown layout, a record has a problem and
            ``skip_bad`` is off, no record is left, or ``split`` or ``limit`` makes no sense here.
    """
    stream = stream_records(
        source, split=split, limit=limit, skip_bad=skip_bad, need_paraphrase=need_paraphrase
    )
    large = _is_large(source)
    kept: list[Record] = []
    starts = array("q")
    for record in stream:
        if large and stream.start >= 0:
            starts.append(stream.start)
        else:
            kept.append(record)
    records: Sequence[Record] = tuple(kept)
    if starts and stream.layout is not None:
        records = _RecordsOnDisk(Path(source), stream.layout, starts)
    return RecordSet(
        records,
        tuple(stream.skipped),
        str(source),
        stream.layout_name,
        stream.unused,
        stream.warnings,
        stream.lines,
    )


def stream_records(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    need_paraphrase: bool = False,
) -> RecordStream:
    """The records of a source one at a time, in flat memory; arguments and errors are those of :func:`read_records`.

    Without ``skip_bad``, the first problem ends the records; the error comes when the rest of the file is checked.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; give a whole number from 1 up, or none to read everything")
    if source != ATLAS and split is not None:
        raise DataError(
            f"split {split!r} was asked of the file {source}, but only the built-in 'atlas' has splits; leave it out "
            "and give the file that holds those records"
        )
    stream = RecordStream(source, limit, skip_bad, need_paraphrase)
    if source == ATLAS:
        stream.layout_name = "built-in facts"
        stream.records = iter(atlas.load(split, limit))
    return stream


def _is_large(source: str | Path) -> bool:
    try:
        return str(source) != _reader.STDIN and Path(source).stat().st_size > LARGE_FILE
    except (OSError, ValueError):
        return False


class RecordStream(Iterator[Record]):
    """The records of a source; the attributes are complete once the last record is read.

    Attributes:
        source: the path, or ``"atlas"``.
        records: those that are still to come.
        layout: of the file, by its first record.
        layout_name: of the layout.
        skipped: the problems of the records that were left out.
        unused: fields that are not read, each with the number of records that have it.
        lines: on which the records start.
        start: the byte at which the latest record starts; -1 where it cannot be found by that.
    """

    def __init__(self, source: str | Path, limit: int | None, skip_bad: bool, need_paraphrase: bool) -> None:
        self.source = source
        self.layout: Layout | None = None
        self.layout_name = ""
        self.skipped: list[Problem] = []
        self.unused: Counter[str] = Counter()
        self.lines = array("Q")
        self.start = -1
        self._limit, self._skip_bad, self._need_paraphrase = limit, skip_bad, need_paraphrase
        self._edits = (array("q"), array("q"))  # hashes of the prompts, and of the prompts with their targets
        self._repeated: Counter[str] = Counter()
        self._first_repeated = 0
        self._spaced = self._first_spaced = 0
        self.records = self._read()

    def __next__(self) -> Record:
        return next(self.records)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Doubts about the records read so far: repeated keys, repeated records and contradictions."""
        found = []
        if self._repeated:
            keys, line = _listed(self._repeated), self._first_repeated
            found.append(f"keys that one object has twice, of which the last counts: {keys}; see line {line}")
        prompts, edits = (np.frombuffer(hashes, dtype=np.int64) for hashes in self._edits)
        _, first = np.unique(edits, return_index=True)
        if again := len(edits) - len(first):
            repeats = np.delete(np.arange(len(edits)), first)
            place = self._place(repeats[0])
            found.append(
                f"{again} of {len(edits)} records have the prompt and target of another; see {place}"
            )
        if self._spaced:
            found.append(
                f"{self._spaced} records have white space that is easily overlooked, at the end of the target or both "
                "before and at its start; texts are edited and scored as they are; see "
                + self._place(self._first_spaced)
            )
        unlike, counts = np.unique(prompts[first], return_counts=True)
        if several := int((counts > 1).sum()):
            place = self._place(np.flatnonzero(np.isin(prompts, unlike[counts > 1]))[0])
            found.append(
                f"{several} prompt{'s have' if several > 1 else ' has'} several targets; see {place}"
            )
        return tuple(found)

    def _place(self, index: int) -> str:
        return f"record {index + 1} on line {self.lines[index]}"

    def _read(self) -> Iterator[Record]:
        with _reader.opened(self.source) as file:
            count = 0
            for raw in _reader.values(file, str(self.source), prompt_field):
                record = self._record(raw)
                if record is None:
                    if not self._skip_bad and len(self.skipped) >= _MOST_PROBLEMS:
                        break
                    continue
                count += 1
                if not self.skipped or self._skip_bad:
                    yield record
                if count == self._limit:
                    break
        if self.skipped and not self._skip_bad:
            raise DataError(_summary(str(self.source), self.skipped))
        if self.skipped and not count:
            raise DataError(f"{_summary(str(self.source), self.skipped)}\nno usable record is left")
        if not count:
            raise DataError(f"{self.source} holds no record")

    def _record(self, raw: Raw) -> Record | None:
        """The record of a value, or None after its problems were noted."""
        name, value = str(self.source), raw.value
        if isinstance(value, Problem):
            self.skipped.append(value)
            return None
        if not isinstance(value, dict):
            self.skipped.append(Problem(name, raw.line, "", "a JSON object", describe(value), item=raw.item))
            return None
        if self.layout is None:
            self.layout = _layout(name, raw.line, value)
            self.layout_name = self.layout.name
        record, fields = self.layout.read(value, need_paraphrase=self._need_paraphrase)
        if fields.problems:
            self.skipped += [Problem(name, raw.line, *problem, raw.item) for problem in fields.problems]
            return None
        self.unused.update(dict.fromkeys(map(escaped, fields.unused), 1))
        if raw.repeated:
            self._first_repeated = self._first_repeated or raw.line
            self._repeated.update(dict.fromkeys(map(escaped, raw.repeated), 1))
        self.lines.append(raw.line)
        self.start = raw.start
        twice = record.prompt[-1].isspace() and record.target[0].isspace()
        if twice or record.target[-1].isspace():
            self._first_spaced = self._first_spaced if self._spaced else len(self._edits[0])
            self._spaced += 1
        prompt = normalised(record.prompt)
        self._edits[0].append(hash(prompt))
        self._edits[1].append(hash((prompt, record.target.strip())))
        return record


def _layout(name: str, line: int, raw: dict[str, object]) -> Layout:
    layout = find_layout(raw)
    if layout is None:
        keys = [f"'{escaped(key)}'" for key in list(raw)[:_SHOWN]]
        found = f"the keys {', '.join(keys)}{', ...' * (len(raw) > _SHOWN)}" if raw else "an empty object"
        raise DataError(str(Problem(name, line, "", KNOWN, found)))
    return layout


class _RecordsOnDisk(Sequence[Record]):
    """The records of a file, read whenever they are asked for.

    Args:
        path: of the file, which was read before.
        layout: of the file.
        starts: the byte at which each record starts, in their order.
    """

    def __init__(self, path: Path, layout: Layout, starts: array[int]) -> None:
        self._path, self._layout, self._starts = path, layout, starts
        self._state = self._stat()

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Record]:
        starts = iter(self._starts)
        start = next(starts, None)
        self._check()
        with _reader.opened(self._path) as file:
            for raw in _reader.values(file, str(self._path), prompt_field):
                if raw.start == start and isinstance(raw.value, dict):
                    yield self._layout.read(raw.value)[0]
                    if (start := next(starts, None)) is None:
                        return

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        chosen = self._starts[index] if isinstance(index, slice) else [self._starts[index]]
        self._check()
        with _reader.opened(self._path) as file:
            found = tuple(self._at(file, start) for start in chosen)
        return found if isinstance(index, slice) else found[0]

    def _at(self, file: BinaryIO, start: int) -> Record:
        raw = _reader.value_at(file, str(self._path), start)
        return self._layout.read(raw if isinstance(raw, dict) else {})[0]

    def _stat(self) -> tuple[int, int]:
        with _reader.opened(self._path) as file:
            found = os.fstat(file.fileno())
        return found.st_size, found.st_mtime_ns

    def _check(self) -> None:
        if self._stat() != self._state:
            raise DataError(f"{self._path} has changed since it was read; start again")


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records in emendo's own layout, one JSON object a line; empty fields are left out.

    Raises:
        StorageError: the file cannot be written, or a text is not valid Unicode; an older file of that name is then
            kept.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                filled = {k: v for k, v in record.as_dict().items() if v or k == "separator"}
                file.write(json.dumps(filled, ensure_ascii=False) + "\n")
        partial.replace(path)
    except (OSError, UnicodeEncodeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(f"{path} cannot be written: {error}") from error


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count} records)" for name, count in counts.most_common(_SHOWN))


def _summary(name: str, problems: list[Problem]) -> str:
    """All problems of a file in one message."""
    reasons = count_reasons(problems)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    least = "at least " if len(problems) >= _MOST_PROBLEMS else ""
    lines = [f"{name}: {least}{len(problems)} problem(s) in {sum(reasons.values())} record(s) ({why})"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  and {len(problems) - _SHOWN} more")
    return "\n".join(lines)
