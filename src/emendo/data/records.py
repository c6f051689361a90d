"""Reads records from a file or from the built-in facts, and writes them as JSONL.

Five layouts are known, each as a JSON array or as JSONL: the native one (`native.py`), CounterFact
(`counterfact.py`), zsRE as the MEND code reads it (`zsre.py`), MQuAKE (`mquake.py`) and RippleEdits
(`ripple.py`). The keys of the first record tell which one a file has.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emendo.data import atlas, counterfact, mquake, native, ripple, zsre
from emendo.data.schema import Fields, Probe, Problem, Record, RecordSet, count_reasons, describe
from emendo.errors import DataError, StorageError

__all__ = ["Probe", "Problem", "Record", "RecordSet", "read_records", "write_records"]

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class _Layout:
    keys: frozenset[str]  # any of these tells the layout
    paraphrase: str  # the field that holds the paraphrases
    to_record: Callable[[Fields], Record]


_LAYOUTS = tuple(  # the native keys are the least telling ones, so they come last
    _Layout(module.KEYS, module.PARAPHRASE, module.to_record)
    for module in (counterfact, zsre, mquake, ripple, native)
)
_LAYOUT_HELP = (
    "a record with the keys of a known layout: 'prompt' and 'target' (native), 'prompt' and 'target_new' "
    "(CounterFact), 'src' and 'alt' (zsRE), 'requested_rewrite' (MQuAKE), or 'edit' and 'Compositionality_I' "
    "(RippleEdits)"
)


def read_records(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    need_paraphrase: bool = False,
) -> RecordSet:
    """Reads the records of a file, or of the built-in facts.

    Args:
        source: "atlas" for the built-in facts, or the path of a JSON or JSONL file ("./atlas" for a file
            of that name).
        split: a part of the built-in facts ("train", "validation" or "test"); None for all of them.
        limit: stop after this many records; what follows them in the file is not checked.
        skip_bad: leave records with problems out and list the problems in `RecordSet.skipped`.
        need_paraphrase: count a record without a paraphrase as a bad one.

    Raises:
        DataError: the file is missing, unreadable, empty or of an unknown layout, a record has a problem
            (and `skip_bad` is off), no record is left, or `split` or `limit` makes no sense here.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; give a whole number from 1 up, or none to read everything")
    if source == "atlas":
        return RecordSet(atlas.load(split, limit), (), "atlas")
    path = Path(source)
    if split is not None:
        raise DataError(
            f"split {split!r} was asked of the file {path}, but only the built-in 'atlas' has splits; "
            "leave it out and give the file that holds those records"
        )
    records, problems = _read_file(path, limit, need_paraphrase)
    if problems and not skip_bad:
        raise DataError(_summary(path, problems))
    if not records:
        raise DataError(f"{_summary(path, problems)}\nno usable record is left")
    return RecordSet(tuple(records), tuple(problems), str(path))


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Writes records in the native layout, one JSON object a line; empty fields are left out.

    Raises:
        StorageError: the file cannot be written, or a text is not valid Unicode; an older file of that name
            is then kept.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                filled = {key: value for key, value in dataclasses.asdict(record).items() if value}
                file.write(json.dumps(filled, ensure_ascii=False) + "\n")
        partial.replace(path)
    except (OSError, UnicodeEncodeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(f"{path} cannot be written: {error}") from error


def _read_file(path: Path, limit: int | None, need_paraphrase: bool) -> tuple[list[Record], list[Problem]]:
    """The good records of a file, up to the limit, and every problem met on the way."""
    records: list[Record] = []
    problems: list[Problem] = []
    layout: _Layout | None = None
    for item, (line, raw) in enumerate(_raw_records(path, _read_text(path), problems), start=1):
        if not isinstance(raw, dict):
            problems.append(Problem(str(path), line, "", "a JSON object", describe(raw), item=item))
            continue
        layout = layout or _find_layout(path, line, raw)
        fields = Fields(raw)
        record = layout.to_record(fields)
        if need_paraphrase and not record.paraphrases and not fields.notes:
            fields.note(layout.paraphrase, "at least one paraphrase", "none")
        problems.extend(Problem(str(path), line, *note, item) for note in fields.notes)
        if not fields.notes:
            records.append(record)
        if limit is not None and len(records) == limit:
            break
    if not records and not problems:
        raise DataError(f"{path} holds no record")
    return records, problems


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the path of a record file, or 'atlas'") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file (byte {error.start} is not valid)") from error
    if not text.strip():
        raise DataError(f"{path} is empty; a record file has one JSON object a line, or a JSON array of them")
    return text


def _find_layout(path: Path, line: int, raw: dict[str, object]) -> _Layout:
    for layout in _LAYOUTS:
        if layout.keys & raw.keys():
            return layout
    found = f"the keys {', '.join(map(repr, raw))}" if raw else "an empty object"
    raise DataError(str(Problem(str(path), line, "", _LAYOUT_HELP, found)))


def _raw_records(path: Path, text: str, problems: list[Problem]) -> Iterator[tuple[int, object]]:
    """The JSON values of an array or of JSONL, each with the line on which it starts."""
    if text.lstrip().startswith("["):
        yield from _array(path, text)
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            raw = json.loads(content)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be parsed"
            found = f"{content.strip()[:40]!r} ({reason})"
            problems.append(Problem(str(path), line, "", "a line with one JSON object", found))
        else:
            yield line, raw


def _array(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """The items of a JSON array; what follows a syntax error cannot be read, so that is always fatal."""
    decoder = json.JSONDecoder()
    position = _after_space(text, text.index("[") + 1)
    line, counted = 1, 0
    if text.startswith("]", position):
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            raw, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise _broken(path, text, at, "valid JSON") from error
        yield line, raw
        position = _after_space(text, position)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise _broken(path, text, position, "',' or ']' after a record")
        position = _after_space(text, position + 1)
    if text[position + 1 :].strip():
        raise _broken(path, text, _after_space(text, position + 1), "nothing after the closing ']'")


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken(path: Path, text: str, position: int, expected: str) -> DataError:
    found = repr(text[position : position + 40]) if position < len(text) else "the end of the file"
    return DataError(str(Problem(str(path), text.count("\n", 0, position) + 1, "", expected, found)))


def _summary(path: Path, problems: list[Problem]) -> str:
    """All problems of a file in one message."""
    reasons = count_reasons(problems)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    lines = [f"{path}: {len(problems)} problem(s) in {sum(reasons.values())} record(s) ({why})"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  and {len(problems) - _SHOWN} more")
    return "\n".join(lines)
