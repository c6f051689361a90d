"""Reading and writing record files: layouts, every kind of bad input, round trip."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.layouts import SAMPLES
from emendo.data import Probe, Record, read_records, write_records
from emendo.data.records import RecordSet
from emendo.errors import DataError, EmendoError, StorageError

SHARED = Path(__file__).parents[3] / "shared" / "data"

GOOD: dict[str, Any] = {
    "prompt": "The capital of France is",
    "target": "Rome",
    "paraphrases": ["France's capital is"],
}
COUNTERFACT, ZSRE = (
    {s.layout: s.raw for s in SAMPLES}[name] for name in ("CounterFact, one paraphrase", "zsRE")
)


def write(path: Path, *records: object, layout: str = "jsonl") -> Path:
    """Writes raw values as JSONL (a text is written as it is) or as an indented array."""
    if layout == "array":
        path.write_text(json.dumps(list(records), indent=1), encoding="utf-8")
    else:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def message(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        read_records(path, **options)
    return str(error.value)


def test_record_set(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "", GOOD | {"target": "Oslo"})
    records = read_records(str(path))
    assert (type(records), records.source, records.skipped) == (RecordSet, str(path), ())
    assert len(records) == 2
    assert records[1].target == "Oslo"
    assert records[:1] == (records[0],)
    assert list(records) == list(records.records)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\r\n").encode() * 2)
    assert len(read_records(path)) == 2


def test_line_separators_inside_texts_do_not_split_lines(tmp_path: Path) -> None:
    record = Record("one\u2028two\x85three\x1cfour", "five")
    write_records([record], tmp_path / "a.jsonl")
    assert read_records(tmp_path / "a.jsonl").records == (record,)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": None}, "field 'prompt': expected a non-empty text, found null"),
        ({"prompt": ""}, "field 'prompt': expected a non-empty text, found an empty text"),
        ({"prompt": " \t\n"}, "field 'prompt': expected a non-empty text, found only whitespace"),
        ({"target": "  "}, "field 'target': expected a non-empty text, found only whitespace"),
        ({"target": 5}, "field 'target': expected a non-empty text, found the number 5"),
        ({"target": True}, "field 'target': expected a non-empty text, found the boolean true"),
        ({"target": ["a"]}, "field 'target': expected a non-empty text, found a list of length 1"),
        ({"target": {}}, "field 'target': expected a non-empty text, found an object of length 0"),
        ({"subject": 1.5}, "field 'subject': expected a non-empty text, found the number 1.5"),
        ({"id": False}, "field 'id': expected a non-empty text, found the boolean false"),
        ({"answer": True}, "field 'answer': expected a text or a list of texts, found the boolean true"),
        (
            {"paraphrases": "one text"},
            "field 'paraphrases': expected a list of non-empty texts, found the text 'one text'",
        ),
        ({"paraphrases": ["x", 2]}, "field 'paraphrases[1]': expected a non-empty text, found the number 2"),
        (
            {"neighbours": {"prompt": "a", "answer": "b"}},
            "field 'neighbours': expected a list of objects with 'prompt' and 'answer', found an object of",
        ),
        (
            {"neighbours": ["a"]},
            "field 'neighbours[0]': expected an object with 'prompt' and 'answer', found the text 'a'",
        ),
        (
            {"unrelated": [{"prompt": "a"}]},
            "field 'unrelated[0].answer': expected a non-empty text, found nothing",
        ),
        (
            {"neighbors": []},
            "field 'neighbors': expected the field name 'neighbours', found a name that is not in the schema",
        ),
    ],
)
def test_malformed_native_field(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "", GOOD | change)
    assert f"{path}:3: {expected}" in message(path)
    array = write(tmp_path / "a.json", GOOD, GOOD | change, layout="array")
    assert f"{array}:9: {expected}" in message(array)  # a good record takes seven lines, from line 2


@pytest.mark.parametrize(
    ("raw", "field", "rest"),
    [
        ({"prompt": "a"}, "target", "expected a non-empty text, found nothing"),
        ({"target": "a"}, "prompt", "expected a non-empty text, found nothing"),
        (COUNTERFACT | {"target_new": ""}, "target_new", "expected a non-empty text, found an empty text"),
        (COUNTERFACT | {"locality_prompt": 5}, "locality_prompt", "expected a non-empty text"),
        (COUNTERFACT | {"case_id": [1]}, "case_id", "expected a non-empty text, found a list of length 1"),
        (COUNTERFACT | {"rephrase_prompt": 3}, "rephrase_prompt", "expected a non-empty text, found the num"),
        (ZSRE | {"alt": " "}, "alt", "expected a non-empty text, found only whitespace"),
        (ZSRE | {"answers": [True]}, "answers", "expected a text or a list of texts, found the boolean true"),
        (ZSRE | {"loc_ans": False}, "loc_ans", "expected a text or a list of texts, found the boolean false"),
    ],
)
def test_first_record_tells_the_layout_even_when_it_is_bad(
    tmp_path: Path, raw: dict[str, Any], field: str, rest: str
) -> None:
    path = write(tmp_path / "a.jsonl", raw)
    assert f"{path}:1: field '{field}': {rest}" in message(path)


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"prompt": " ", "target": i} for i in range(7)], GOOD)
    text = message(path)
    assert text.startswith(f"{path}: 14 problem(s) in 7 record(s) (7 malformed)\n")
    assert text.count("expected") == 10
    assert text.endswith("and 4 more")
    assert f"{path}:5: field 'target': expected a non-empty text, found the number 4" in text


def test_bad_json_in_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, '{"prompt": ', "[1]", GOOD)
    text = message(path)
    assert f"{path}:2: expected a line with one JSON object, found '{{\"prompt\":' (Expecting value)" in text
    assert f"{path}:3: expected a JSON object, found a list of length 1" in text


def test_skip_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{", GOOD, 3, GOOD | {"target": ""}, GOOD)
    records = read_records(path, skip_bad=True)
    assert len(records) == 2
    assert [(problem.line, problem.field) for problem in records.skipped] == [(1, ""), (3, ""), (4, "target")]
    assert str(records.skipped[2]) == (
        f"{path}:4: field 'target': expected a non-empty text, found an empty text"
    )
    only_bad = write(tmp_path / "b.jsonl", {"prompt": "a"})
    assert message(only_bad, skip_bad=True).endswith("no usable record is left")


def test_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, "{")
    assert len(read_records(path, limit=2)) == 2
    assert len(read_records(write(tmp_path / "b.jsonl", "{", GOOD, GOOD), limit=1, skip_bad=True)) == 1
    assert "limit is 0; give a whole number from 1 up" in message(path, limit=0)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"prompt": "a", "target": "b"}, "paraphrases"),
        ({key: value for key, value in COUNTERFACT.items() if key != "rephrase_prompt"}, "rephrase_prompt"),
        ({key: value for key, value in ZSRE.items() if key != "rephrase"}, "rephrase"),
    ],
)
def test_need_paraphrase(tmp_path: Path, raw: dict[str, Any], field: str) -> None:
    path = write(tmp_path / "a.jsonl", raw)
    assert read_records(path)[0].paraphrases == ()
    expected = f"{path}:1: field '{field}': expected at least one paraphrase, found none"
    assert expected in message(path, need_paraphrase=True)


def test_unknown_layout(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "a", "reply": "b"})
    text = message(path)
    assert f"{path}:1: expected a record with the keys of a known layout" in text
    assert "'src' and 'alt' (zsRE)" in text
    assert "found the keys 'question', 'reply'" in text
    assert "found an empty object" in message(write(tmp_path / "b.jsonl", {}))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", " is empty"),
        (" \n\n", " is empty"),
        ("[]", " holds no record"),
        ("[\n", ":2: expected valid JSON, found the end of the file"),
        ('[\n{"prompt": "a",\n "target": }\n]', ":3: expected valid JSON, found '}\\n]'"),
        ('[\n{"prompt": "a", "target": "b"}\n{"prompt"', ":3: expected ',' or ']' after a record, found '{"),
        ('[{"prompt": "a", "target": "b"}', ":1: expected ',' or ']' after a record, found the end of the"),
        ('[{"prompt": "a", "target": "b"},\n]', ":2: expected valid JSON, found ']'"),
        ('[{"prompt": "a", "target": "b"}]\nmore', ":2: expected nothing after the closing ']', found"),
    ],
)
def test_broken_file(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    for skip_bad in (False, True):
        assert f"{path}{expected}" in message(path, skip_bad=skip_bad)


def test_unreadable_paths(tmp_path: Path) -> None:
    assert "does not exist; give the path of a record file, or 'atlas'" in message(tmp_path / "none.json")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"prompt": "caf\xe9"}')
    assert "is not a UTF-8 text file (byte 15 is not valid)" in message(tmp_path / "latin.json")


def test_split_is_for_the_atlas(tmp_path: Path) -> None:
    text = message(write(tmp_path / "a.jsonl", GOOD), split="test")
    assert "split 'test' was asked of the file" in text
    assert "only the built-in 'atlas' has splits" in text


def test_errors_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist") as error:
        read_records(tmp_path / "none")
    assert isinstance(error.value, EmendoError)


def test_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records([Record("a", "b")], path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="cannot be written"):
        write_records([Record("c", "d")], tmp_path / "no folder" / "a.jsonl")
    with pytest.raises(StorageError, match="surrogates not allowed"):
        write_records([Record("c", "\ud800")], path)
    assert list(tmp_path.iterdir()) == [path], "no partial file is left"
    (tmp_path / "a.jsonl.partial").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_records([Record("c", "d")], path)
    assert path.read_bytes() == before


TEXT = st.text(min_size=1).filter(lambda text: bool(text.strip()))
PROBES = st.lists(st.builds(Probe, TEXT, TEXT), max_size=2).map(tuple)
RECORDS = st.builds(
    Record,
    prompt=TEXT,
    target=TEXT,
    subject=st.none() | TEXT,
    relation=st.none() | TEXT,
    id=st.none() | TEXT,
    paraphrases=st.lists(TEXT, max_size=3).map(tuple),
    neighbours=PROBES,
    unrelated=PROBES,
    answer=st.none() | TEXT.map(str.strip),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS, min_size=1, max_size=4))
def test_round_trip(tmp_path: Path, records: list[Record]) -> None:
    path = tmp_path / "records.jsonl"
    write_records(records, path)
    assert read_records(path).records == tuple(records)


@pytest.mark.parametrize(
    ("name", "records", "skipped"),
    [
        ("counterfact-train.json", 10_000, 0),
        ("counterfact-dev.json", 2_000, 0),
        ("zsre-mend-dev.json", 599, 1),
    ],
)
def test_real_files(name: str, records: int, skipped: int) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in the shared data folder")
    found = read_records(SHARED / name, skip_bad=True, need_paraphrase=True)
    assert (len(found), len(found.skipped)) == (records, skipped)
    assert all(record.prompt and record.target and record.answer for record in found)
    assert all(record.neighbours or record.unrelated for record in found)
    for problem in found.skipped:
        line = (SHARED / name).read_text(encoding="utf-8").split("\n")[problem.line - 1]
        assert line.startswith("{")
        assert problem.field == "alt"
