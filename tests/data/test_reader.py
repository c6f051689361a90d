"""Files of every kind: what is read of them and how much, what is refused and in which words."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from cases import in_slow_suite
from emendo.data import Record, _json, _reader, read_records, records, stream_records
from emendo.errors import DataError

SIZE = 20_000
GOOD = {"prompt": "The capital of France is", "target": "Rome", "paraphrases": ["France's capital is"]}
LINE = json.dumps(GOOD)


def message(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        read_records(path, **options)
    return str(error.value)


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# What is not a file of records


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "link", Path("/dev/zero"), Path("/dev/null")):
        assert message(path).startswith(f"{path} is not a regular file but a pipe, a socket or a device; ")
    assert message(tmp_path) == f"{tmp_path} cannot be read: it is a folder; give the path of a record file"
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert "does not exist" in message(tmp_path / "gone")
    assert "cannot be read" in message(tmp_path / ("x" * 300))
    assert "cannot be read" in message("a\0b")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.jsonl", LINE)

    def refuse(*args: object, **kwargs: object) -> BinaryIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read everything
    assert message(path) == f"{path} cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LINE.encode("utf-16"), "UTF-16 text"),
        (LINE.encode("utf-32"), "UTF-32 text"),
        (LINE.encode("utf-16-le"), "(byte 1 is zero)"),
        (bytes(1000), "(byte 0 is zero)"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"PK\x03\x04", "a ZIP archive or an Excel sheet"),
        (b"PAR1\x15", "a Parquet file"),
        (b'{"prompt": "caf\xe9"}', "(byte 15 is not valid)"),
        (
            b"\xef\xbb\xbf" + LINE.encode() + b'\n{"prompt": "caf\xe9"}',
            f"(byte {len(LINE) + 19} is not valid)",
        ),
        (b'[{"prompt": "caf\xe9"}]', "(byte 16 is not valid)"),
        (
            b'[{"prompt": "x", "target": "y"}, "' + b"\xc3\xa9" * 40_000 + b'\xff"]',
            "(byte 80034 is not valid)",
        ),
        (b'[{"prompt": "x", "target": "y"}, "\xc3', "(byte 34 is not valid)"),
        (b"prompt,target\ncaf\xe9,x\n", "(byte 17 is not valid)"),
    ],
)
def test_what_is_not_utf_8(content: bytes, what: str, tmp_path: Path) -> None:
    text = message(put(tmp_path / "a.json", content))
    assert f"{tmp_path / 'a.json'} is not a UTF-8 text file" in text and what in text


@pytest.mark.parametrize("form", ["{}", "[{}]", "[{good},\n{}]"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('{"prompt": "a", "target": ' + "9" * 5000 + "}", "found a whole number of 5000 digits"),
        ('{"prompt": "a", "target": "b", "id": -' + "9" * 5000 + "}", "found a whole number of 5001 digits"),
        (
            '{"prompt": "a", "target": "b\\ud800"}',
            r"expected valid Unicode, found the lone surrogate '\ud800'",
        ),
        ('{"prompt": "a", "target": "b", "answer": ["\\udc80"]}', r"the lone surrogate '\udc80'"),
        ('{"prompt": "a", "target": NaN}', "expected a non-empty text, found the number nan"),
        ("3", "expected a JSON object, found the number 3"),
    ],
)
def test_hostile_values(form: str, value: str, expected: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", form.replace("{}", value, 1).replace("{good}", LINE))
    text = message(path)
    assert expected in text and len(text) < 500
    text.encode()


def test_long_ids_are_texts(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", json.dumps(GOOD | {"id": 2**63 + 1}))
    assert read_records(path)[0].id == "9223372036854775809"


def test_text_that_is_no_data_is_given_up_early(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "Some running text.\n" * 5000)
    text = message(path)
    assert "a.txt:100: expected a line with one JSON object" in text
    assert "holds no JSON in its first 100 lines" in text and len(text) < 500
    assert "in its first 100 lines" in message(path, skip_bad=True)
    path = put(tmp_path / "b.txt", "Some running text.\n" * 50 + (LINE + "\n") * 2000)
    assert len(read_records(path, skip_bad=True)) == 2000
    path = put(tmp_path / "c.jsonl", LINE + "\n" + "{\n" * 5000)
    assert "at least 1000 problem(s)" in message(path)


def test_a_table_of_other_columns_is_called_a_table(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "name,age\n" + "Ada,36\n" * 4606)
    text = message(path)
    assert "is a CSV table with the columns 'name', 'age', which are not the fields of a known layout" in text
    assert "a record with the keys" in message(
        put(tmp_path / "b.json", '{"names": ["a", "b"], "ages": [1, 2]}')
    )
    assert "'names', 'ages'" in message(tmp_path / "b.json")


def test_damaged_tables(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "prompt,target\na,b\nc,d,e\nf\ng,h\n")
    text = message(path)
    assert "a.csv:3: expected 2 cells, as in the first line, found 3 of them" in text
    assert "a.csv:4: expected 2 cells, as in the first line, found 1 of them" in text
    assert [record.prompt for record in read_records(path, skip_bad=True)] == ["a", "g"]
    unclosed = put(tmp_path / "b.csv", 'prompt,target\na,b\nc,"' + "x\n" * 100_000)
    assert "b.csv:3: expected a row of a CSV table, found one that is damaged" in message(unclosed)


def test_values_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_json, _reader):
        monkeypatch.setattr(module, "LARGEST", 1000)
    monkeypatch.setattr(_json, "CHUNK", 100)
    long = json.dumps(GOOD | {"note": "x" * 5000})
    for content in (f"{LINE}\n{long}", f"[{LINE},\n{long}]", f"prompt,target\n{'x' * 5000},b\n"):
        assert ":2: a record is larger than 0 MiB" in message(put(tmp_path / "a.json", content))


# Standard input


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    return give  # type: ignore[return-value]


def test_standard_input(stdin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(f"{LINE}\n{LINE}".encode())
    found = read_records("-")
    assert (len(found), found.source) == (2, "-")
    stdin(b"")
    assert message("-").startswith("- is empty")
    monkeypatch.setattr(_reader, "LARGEST_STDIN", 100)
    stdin(LINE.encode() * 2)
    assert "standard input holds more than" in message("-")


# Streaming


def forms(count: int = SIZE) -> dict[str, str]:
    row = "The capital of France is,Rome,x"
    return {
        "lines": (LINE + "\n") * count,
        "array": "[" + ",\n".join([LINE] * count) + "]",
        "array on one line": "[" + ", ".join([LINE] * count) + "]",
        "table": "prompt,target,paraphrases\n" + f"{row}\n" * count,
    }


@pytest.mark.parametrize("form", list(forms()))
def test_a_limit_stops_reading(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.json", forms()[form])
    files: list[BinaryIO] = []
    opened = Path.open

    def unbuffered(self: Path, *args: Any, **options: Any) -> BinaryIO:
        files.append(opened(self, *args, buffering=0, **options))
        files[-1] = Counted(files[-1])  # type: ignore[assignment]
        return files[-1]

    monkeypatch.setattr(Path, "open", unbuffered)
    assert len(read_records(path, limit=1)) == 1
    (file,) = files
    assert 0 < file.count <= 3 * _json.CHUNK < path.stat().st_size / 3  # type: ignore[attr-defined]


class Counted(io.BufferedReader):
    """Counts the bytes that are read of a file."""

    def __init__(self, raw: Any) -> None:
        self.count = 0
        inner = raw.readinto

        def readinto(buffer: Any) -> int:
            found = inner(buffer)
            self.count += found
            return int(found)

        raw.readinto = readinto
        super().__init__(raw)


@pytest.mark.parametrize("form", ["lines", *in_slow_suite("array", "table")])
def test_reading_takes_flat_memory(form: str, tmp_path: Path) -> None:
    content = forms(1000)[form]
    sizes = []
    for times in (1, 3):
        path = put(tmp_path / "a.json", more(content, times))
        tracemalloc.start()
        count = sum(1 for _ in stream_records(path))
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 1000 * times
    assert sizes[1] - sizes[0] < 2 * 1000 * 80, "not the records, but some numbers of each"


def more(content: str, times: int) -> str:
    if content.startswith("["):
        return "[" + ",".join([content[1:-1]] * times) + "]"
    if content.startswith("prompt"):
        header, _, rows = content.partition("\n")
        return f"{header}\n{rows * times}"
    return content * times


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["lines", "array", "one line", "mixed"])
def test_records_that_stay_in_the_file(
    form: str, bom: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raws = [GOOD | {"prompt": f"Die Hauptstadt von Ö{i} ist", "note": "é" * (i % 300)} for i in range(700)]
    lines = [json.dumps(raw, ensure_ascii=i % 2 == 0) for i, raw in enumerate(raws)]
    text = {
        "lines": "\n\n".join(lines),
        "array": "[\n " + " ,\n".join(lines) + "\n]\n",
        "one line": "[" + ",".join(lines) + "]",
        "mixed": "\r\n".join(["{"[: i % 3 == 2] + line for i, line in enumerate(lines)]),
    }[form]
    path = put(tmp_path / "a.json", bom + text)
    kept = read_records(path, skip_bad=True)
    monkeypatch.setattr(records, "LARGE_FILE", 100)
    held = read_records(path, skip_bad=True)
    assert isinstance(kept.held, tuple) and not isinstance(held.held, tuple)
    assert len(held) == len(kept) == (467 if form == "mixed" else 700)
    assert held.records == kept.records and list(held.lines) == list(kept.lines)
    assert held[5] == kept[5] and held[-1] == kept[-1] and held[3:400:7] == kept[3:400:7]
    with pytest.raises(IndexError):
        held[700]
    path.write_text(LINE)
    for ask in (lambda: held[0], lambda: held.records):
        with pytest.raises(DataError, match="has changed since it was read; start again"):
            ask()


def test_values_that_a_chunk_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raws = [
        GOOD | {"id": 10**i, "answer": 'é\n\u2028\\"' * i, "note": [True, None, -1.5e-10]} for i in range(12)
    ]
    text = json.dumps(raws)
    whole = read_records(put(tmp_path / "a.json", text)).records
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr(_json, "CHUNK", chunk)
        assert read_records(tmp_path / "a.json").records == whole
        assert "expected ',' or ']' after a record, found the end" in message(
            put(tmp_path / "b.json", text[:-1])
        )
    assert [record.id for record in whole] == [str(10**i) for i in range(12)]


# What is doubtful


def test_repeated_keys_and_records_are_counted(tmp_path: Path) -> None:
    other = json.dumps(GOOD | {"target": "Oslo"})
    twice = LINE[:-1] + ', "target": "Bern", "subject": "France", "subject": "F"}'
    found = read_records(put(tmp_path / "a.jsonl", "\n".join([LINE, other, LINE, LINE, twice])))
    assert found.warnings == (
        "keys that one object has twice, of which the last counts: target (1 records), subject (1 records); see line 5",
        "2 of 5 records have the prompt and target of another; see record 3 on line 3",
        "1 prompt has several targets; see record 1 on line 1",
    )
    assert found[4].target == "Bern"
    assert read_records(put(tmp_path / "b.jsonl", LINE)).warnings == ()
    array = read_records(put(tmp_path / "c.json", f"[{LINE}, {twice}]"))
    assert "see line 1" in array.warnings[0]
    table = read_records(put(tmp_path / "d.csv", "prompt,target,target\na,b,c\n"))
    assert table.warnings == (
        "keys that one object has twice, of which the last counts: target (1 records); see line 2",
    )
    assert table.records == (Record("a", "c"),)


def test_white_space_that_is_overlooked_is_kept_and_said(tmp_path: Path) -> None:
    rows = [("A is", "x"), ("B is ", "x"), ("C is", " x"), ("D is ", " x"), ("E is", "x\n")]
    lines = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in rows]
    found = read_records(put(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [(record.prompt, record.target) for record in found] == rows
    assert len(found.warnings) == 1
    assert (
        found.warnings[0].startswith("2 records have white space")
        and "record 4 on line 4" in found.warnings[0]
    )


def test_names_of_unused_fields_can_be_shown(tmp_path: Path) -> None:
    found = read_records(
        put(tmp_path / "a.jsonl", json.dumps(GOOD | {"\x1b[2J": 1, "\ud800": 1, "x" * 500: 1}))
    )
    assert list(found.unused) == ["\\x1b[2J", "\\ud800", "x" * 80 + "..."] or set(found.unused) == {
        "\\x1b[2J", "\\ud800", "x" * 80 + "...",
    }  # fmt: skip
