"""Whatever a file holds, reading it gives records or one DataError, and never anything else."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.layouts import SAMPLES
from emendo.data import Record, read_records, stream_records
from emendo.errors import DataError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", " ", "{}", "[X]", "[Y]", "\ud800", "\x1b[2J", "\x00", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({key for sample in SAMPLES for key in sample.raw})


def mutate(value: Any, draw: st.DrawFn) -> None:
    """Change one value at a random depth: to another, away, to another key, or into a list of it."""
    seed = random.Random(draw(st.integers(0, 2**32)))
    while isinstance(value, dict | list) and value:
        key = seed.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[key], dict | list) and seed.random() < 0.7:
            value = value[key]
            continue
        match seed.randrange(4):
            case 0:
                value[key] = draw(JSON)
            case 1:
                del value[key]
            case 2 if isinstance(value, dict):
                value[draw(st.sampled_from(KEYS))] = value.pop(key)
            case _:
                value[key] = [value[key]]
        return


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """The bytes of a file: samples of a layout with some values changed, random objects, broken text, random bytes."""
    sample = draw(st.sampled_from(SAMPLES)).raw
    values: list[Any] = [json.loads(json.dumps(sample)) for _ in range(draw(st.integers(1, 4)))]
    for _ in range(draw(st.integers(0, 3))):
        mutate(values[draw(st.integers(0, len(values) - 1))], draw)
    objects = st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=6)
    values += draw(st.just([]) | st.lists(objects | JSON, max_size=2))
    texts = [json.dumps(value, ensure_ascii=draw(st.booleans())) for value in values]
    match draw(st.sampled_from(["lines", "lines", "array", "array", "indented", "one", "table", "columns"])):
        case "lines":
            text = draw(st.sampled_from(["\n", "\r\n", "\n\n", " "])).join(texts)
        case "array":
            text = "[" + draw(st.sampled_from([",", ", ", ",\n"])).join(texts) + "]"
        case "indented":
            text = json.dumps(values, indent=1)
        case "one":
            text = json.dumps(draw(st.sampled_from([values[0], {"data": values}])), indent=1)
        case "table":
            buffer = io.StringIO()
            names = draw(st.just(list(sample)) | st.lists(st.sampled_from(KEYS), min_size=1, max_size=5))
            rows = draw(st.lists(st.lists(st.text(max_size=12) | st.just("x"), max_size=8), max_size=3))
            csv.writer(buffer).writerows([names, [json.dumps(value) for value in sample.values()], *rows])
            text = buffer.getvalue()
        case _:
            names = list(sample)
            text = json.dumps({name: [draw(JSON), sample[name]] for name in names})
    content = text.encode("utf-8", "surrogatepass")
    match draw(st.integers(0, 11)):
        case 0:
            at = draw(st.integers(0, len(content)))
            content = content[:at] + draw(st.binary(max_size=6)) + content[at + draw(st.integers(0, 9)) :]
        case 1:
            content = draw(st.binary(max_size=60))
        case 2:
            content = b"\xef\xbb\xbf" + content
    return content


def check(path: Path, content: bytes, skip_bad: bool, limit: int | None) -> None:
    """Read a file in every way: all of them agree, and every text of a record can be written."""
    path.write_bytes(content)
    try:
        found = read_records(path, skip_bad=skip_bad, limit=limit)
    except DataError as error:
        str(error).encode()
        with pytest.raises(DataError):
            list(stream_records(path, skip_bad=skip_bad, limit=limit))
        return
    assert 0 < len(found) == len(found.lines) and (limit is None or len(found) <= limit)
    assert found.records == tuple(stream_records(path, skip_bad=skip_bad, limit=limit))
    "".join([*found.warnings, *found.unused, *map(str, found.skipped)]).encode()
    for record in found:
        assert isinstance(record, Record) and record.prompt.strip() and record.target.strip()
        repr((record, record.consequences)).encode()
        probes = (*record.neighbours, *record.unrelated, *record.consequences)
        texts = [
            record.prompt,
            record.target,
            *record.paraphrases,
            *(t for p in probes for t in (p.prompt, p.answer)),
        ]
        optional = [record.subject, record.relation, record.id, record.answer]
        assert all(isinstance(text, str) and text.strip() for text in texts), (
            "what is asked must not be empty"
        )
        "".join(texts + [text for text in optional if text is not None]).encode()


OPTIONS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
@settings(max_examples=60, **OPTIONS)
@given(
    content=contents(),
    skip_bad=st.sampled_from([True, True, False]),
    limit=st.sampled_from([None, None, 1, 2]),
)
def test_a_share_of_all_files(tmp_path: Path, content: bytes, skip_bad: bool, limit: int | None) -> None:
    check(tmp_path / "a.json", content, skip_bad, limit)


@pytest.mark.slow
@settings(max_examples=500, **OPTIONS)
@given(
    content=contents(),
    skip_bad=st.sampled_from([True, True, False]),
    limit=st.sampled_from([None, None, 1, 2]),
)
def test_any_file(tmp_path: Path, content: bytes, skip_bad: bool, limit: int | None) -> None:
    check(tmp_path / "a.json", content, skip_bad, limit)
