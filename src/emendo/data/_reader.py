"""The raw values of a record file, one at a time and in flat memory.

A file is one of four kinds: JSON Lines, a JSON array, a table (CSV, or with tabs or semicolons), or one JSON object
that holds its records in lists. The first three are read in chunks, the last at once. No value may be larger than
64 MiB, so that a damaged file does not fill the memory.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from emendo.data._json import CHUNK, LARGEST, Decoder, Window, refuse_bytes, refuse_size
from emendo.data.schema import Problem
from emendo.errors import DataError

LARGEST_STDIN = 1 << 28
"""Bytes that are read from standard input."""
STDIN = "-"

_HOPELESS = 100  # lines without any JSON after which a file is given up
_OTHER_FORMATS = {
    b"\xff\xfe\x00\x00": "UTF-32 text",
    b"\x00\x00\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstandard archive",
    b"PK\x03\x04": "a ZIP archive or an Excel sheet",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF document",
}


PromptField = Callable[[Mapping[str, object]], str | None]
"""Gives the field that holds an object's prompt; None where no layout has the object's keys."""


class Raw(NamedTuple):
    """One value of a file.

    Attributes:
        value: as JSON gives it, or a :class:`Problem` where it cannot be parsed.
        line: the line on which it starts, from 1.
        item: its number in the file, from 1.
        start: the byte at which it starts, by which it can be found again; -1 where it cannot.
        repeated: keys that occur twice in one object.
    """

    value: object
    line: int
    item: int
    start: int = -1
    repeated: tuple[str, ...] = ()


@contextmanager
def opened(source: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file, or read standard input for ``"-"``.

    Raises:
        DataError: there is no such file, it cannot be read, or it is a folder, a pipe or a device.
    """
    if str(source) == STDIN:
        content = sys.stdin.buffer.read(LARGEST_STDIN + 1)
        if len(content) > LARGEST_STDIN:
            raise DataError(
                f"standard input holds more than {LARGEST_STDIN >> 20} MiB; write it to a file and give its path"
            )
        yield io.BytesIO(content)
        return
    try:
        mode = Path(source).stat().st_mode
        file = Path(source).open("rb") if stat.S_ISREG(mode) else None  # noqa: SIM115 - closed below
    except FileNotFoundError as error:
        raise DataError(f"{source} does not exist; give the path of a record file, or 'atlas'") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise DataError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{source} cannot be read: it is a folder; give the path of a record file")
    if file is None:
        raise DataError(
            f"{source} is not a regular file but a pipe, a socket or a device; give the path of a file, or - for "
            "standard input"
        )
    with file:
        try:
            yield file
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error.strerror or error}") from error


def values(file: BinaryIO, name: str, prompt_field: PromptField) -> Iterator[Raw]:
    """The values of a file from its beginning.

    Args:
        file: seekable, at its start.
        name: of the file, for messages.
        prompt_field: the field that holds the prompt of an object, None where no layout has its keys.

    Raises:
        DataError: the file is not text in UTF-8, is empty, or is damaged so that the rest cannot be parsed.
    """
    head = file.read(CHUNK)
    _check_format(head, name)
    begin = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    file.seek(begin)
    text = head[begin:].decode("utf-8", errors="ignore").lstrip()
    if text.startswith("["):
        yield from _array(Window(file, name, begin))
    elif text.startswith("{"):
        yield from _lines_or_object(file, name, begin, text, prompt_field)
    elif (delimiter := _delimiter(text, name, prompt_field)) is not None:
        yield from _table(file, name, begin, delimiter)
    else:
        yield from _lines(file, name, begin)


def value_at(file: BinaryIO, name: str, start: int) -> object:
    """The value that starts at a byte, as :class:`Raw` gives it.

    Raises:
        DataError: there is none; the file has changed.
    """
    file.seek(start)
    return Window(file, name, start).value()[0]


def _check_format(head: bytes, name: str) -> None:
    """Refuse a file that is not text in UTF-8."""
    for mark, what in _OTHER_FORMATS.items():
        if head.startswith(mark):
            raise DataError(
                f"{name} is not a UTF-8 text file but {what}; convert it to JSON Lines or CSV in UTF-8"
            )
    if b"\x00" in head:
        raise DataError(f"{name} is not a UTF-8 text file (byte {head.index(0)} is zero)")


# JSON Lines, and one object


def _lines_or_object(
    file: BinaryIO, name: str, begin: int, head: str, prompt_field: PromptField
) -> Iterator[Raw]:
    """JSON Lines, unless the file is a single object that is itself no record, or one that spans several lines."""
    first, *rest = [line for line in head.split("\n") if line.strip()]
    if rest and (_is_json(first) or any(line.startswith("{") and _is_json(line) for line in rest)):
        yield from _lines(file, name, begin)
        return
    raws = _sequence(Window(file, name, begin)) if rest else _lines(file, name, begin)
    one = next(raws, None)
    if one is None:
        return
    after = next(raws, None)
    rows = _rows(one.value, name, prompt_field) if after is None and isinstance(one.value, dict) else None
    if rows is not None:
        yield from (Raw(row, one.line, item) for item, row in enumerate(rows, start=1))
        return
    yield one
    if after is not None:
        yield after
    yield from raws


def _is_json(line: str) -> bool:
    try:
        Decoder().decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: BinaryIO, name: str, begin: int) -> Iterator[Raw]:
    """JSON Lines."""
    decoder = Decoder()
    start, item, good = begin, 0, False
    line = 0
    while content := file.readline(LARGEST + 1):
        line += 1
        if len(content) > LARGEST:
            refuse_size(name, line)
        if not content.isspace():
            item += 1
            yield (raw := _line(decoder, content, name, line, item, start))
            good = good or not isinstance(raw.value, Problem)
            if item == _HOPELESS and not good:
                raise DataError(
                    f"{raw.value}\n{name} holds no JSON in its first {_HOPELESS} lines; a record file has one JSON "
                    "object a line, or a JSON array of them, or is a CSV table with the fields' names in its first line"
                )
        start += len(content)
    if not item:
        raise DataError(
            f"{name} is empty; a record file has one JSON object a line, or a JSON array of them, or is a CSV table"
        )


def _line(decoder: Decoder, content: bytes, name: str, line: int, item: int, start: int) -> Raw:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse_bytes(name, start + error.start)
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be parsed"
        why = "it is nested too deeply" if isinstance(error, RecursionError) else why
        found = f"{text.strip()[:40]!r} ({why})"
        decoder.repeated()
        return Raw(Problem(name, line, "", "a line with one JSON object", found, item=item), line, item)
    return Raw(value, line, item, start, decoder.repeated())


# A JSON array


def _array(window: Window) -> Iterator[Raw]:
    """The items of a JSON array. A syntax error is always fatal, since the rest cannot be read."""
    window.peek()
    window.skip()
    item = 0
    while item or window.peek() != "]":
        window.peek()
        line, start, item = window.line, window.start, item + 1
        value, repeated = window.value()
        yield Raw(value, line, item, start, repeated)
        if window.peek() == "]":
            break
        if window.peek() != ",":
            window.refuse("',' or ']' after a record")
        window.skip()
    window.skip()
    if window.peek():
        window.refuse("nothing after the closing ']'")


def _sequence(window: Window) -> Iterator[Raw]:
    """JSON values that follow one another, each over as many lines as it takes."""
    item = 0
    while window.peek():
        line, start, item = window.line, window.start, item + 1
        value, repeated = window.value()
        yield Raw(value, line, item, start, repeated)


# One object that holds lists


def _rows(found: dict[str, Any], name: str, prompt_field: PromptField) -> list[object] | None:
    """The records that one object holds in lists; None where it is a record itself.

    Three forms are known: lists side by side, one a field (``{"prompt": [...], "target": [...]}``), the same with
    numbered objects in place of lists (as pandas writes a table), and records under any names (``{"data": [...]}``).

    Raises:
        DataError: lists side by side differ in length.
    """
    found = {key.rstrip(":"): value for key, value in found.items()}  # DUNE spells "edits:" once
    prompt = prompt_field(found)
    if prompt is None:
        lists = [value for value in found.values() if isinstance(value, list)]
        lists = lists or [[value for value in found.values() if isinstance(value, dict)]]
        records = [value for values in lists for value in values if isinstance(value, dict)]
        return list[object](records) or None
    columns = {key: column for key, value in found.items() if (column := _column(value)) is not None}
    if not all(isinstance(text, str) for text in columns.get(prompt, [None])):
        return None
    if len(set(map(len, columns.values()))) > 1:
        sizes = ", ".join(f"{key!r} {len(column)}" for key, column in columns.items())
        raise DataError(f"{name} holds one JSON object of lists, and these differ in length: {sizes}")
    shared = {key: value for key, value in found.items() if key not in columns}
    return [shared | dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _column(value: object) -> list[object] | None:
    if isinstance(value, dict) and value and all(map(str.isdigit, value)):
        return list(value.values())
    return value if isinstance(value, list) else None


# A table


def _delimiter(text: str, name: str, prompt_field: PromptField) -> str | None:
    """The separator of the cells of a table; None where the file is not a table.

    Raises:
        DataError: it is a table, but no layout has its columns.
    """
    header, _, rest = text.partition("\n")
    second = rest.partition("\n")[0]
    delimiter = max("\t;,|", key=header.count)
    if delimiter not in header:
        return None
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:  # a lone carriage return
        return None
    if prompt_field(dict.fromkeys(map(str.strip, names), "")) is not None:
        return delimiter
    named = all(cell.strip().isidentifier() for cell in names) and delimiter in second
    if named or name.lower().endswith((".csv", ".tsv")):
        raise DataError(
            f"{name} is a CSV table with the columns {', '.join(map(repr, names))}, which are not the fields of a "
            "known layout; name them 'prompt' and 'target', and if need be 'subject', 'paraphrases' and 'answer'"
        )
    return None


def _table(file: BinaryIO, name: str, begin: int, delimiter: str) -> Iterator[Raw]:
    """The rows of a table under the names in its first line; an empty cell is no field."""
    reader = csv.reader(_decoded(file, name, begin), delimiter=delimiter)
    item, line = 0, 1
    try:
        names = [cell.strip() for cell in next(reader)]
        while not any(names):
            names = [cell.strip() for cell in next(reader)]
        twice = tuple(key for key in dict.fromkeys(names) if key and names.count(key) > 1)
        line = reader.line_num + 1
        for cells in reader:
            if any(map(str.strip, cells)):
                item += 1
                row: object = {
                    key: _cell(key, cell)
                    for key, cell in zip(names, cells, strict=False)
                    if key and (cell.strip() or (cell and key == "separator"))
                }
                if len(cells) != len(names):
                    found = f"{len(cells)} of them"
                    row = Problem(
                        name, line, "", f"{len(names)} cells, as in the first line", found, item=item
                    )
                yield Raw(row, line, item, repeated=twice)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}:{line}: expected a row of a CSV table, found one that is damaged ({error})"
        ) from error


def _decoded(file: BinaryIO, name: str, begin: int) -> Iterator[str]:
    start, line = begin, 0
    while content := file.readline(LARGEST + 1):
        line += 1
        if len(content) > LARGEST:
            refuse_size(name, line)
        try:
            yield content.decode("utf-8").replace("\x00", "\ufffd")
        except UnicodeDecodeError as error:
            refuse_bytes(name, start + error.start)
        start += len(content)


def _cell(name: str, text: str) -> object:
    """A cell's text, or the list or object of texts that it spells in JSON or in Python."""
    if text.lstrip().startswith(("[", "{")) and len(text) < CHUNK:
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            held = list(found.values()) if isinstance(found, dict) else found
            if isinstance(held, list) and all(isinstance(one, str | list | dict) for one in held):
                return found
    return [text] if name == "paraphrases" else text
