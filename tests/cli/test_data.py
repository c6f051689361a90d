"""`emendo data`, and what commands note about their records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cases import records
from cli.samples import SHORT, Emendo
from data.layouts import SAMPLES
from emendo.data import Record, write_records

RAW = {sample.layout: sample.raw for sample in SAMPLES}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve records of KnowEdit, of which one is bad and one comes twice."""
    raws = [{**RAW["KnowEdit"], "prompt": f"The employer of person {i} is", "tag": "x"} for i in range(10)]
    path = tmp_path / "knowedit.json"
    path.write_text(json.dumps([raws[0], {**raws[1], "target_new": ""}, *raws[1:], raws[0]], indent=1))
    return path


def test_what_is_understood_of_a_file(emendo_command: Emendo, mixed: Path) -> None:
    figures = emendo_command("data", mixed, "--json").json
    first = figures.pop("first_records")
    (problem,) = figures.pop("first_problems")
    (warning,) = figures.pop("warnings")
    assert figures == {
        "source": str(mixed),
        "layout": "KnowEdit",
        "records": 11,
        "paraphrases": 11,
        "without_paraphrase": 0,
        "neighbours": 0,
        "unrelated": 22,
        "consequences": {"reversed": 11, "one_hop": 11, "two_hop": 0, "alias": 11},
        "unused": {"ground_truth[1:]": 11, "locality.Relation_Specificity.ground_truth[1:]": 11, "tag": 11},
        "problems": 1,
        "left_out": {"malformed": 1},
    }
    assert problem.endswith(
        "(item 2): field 'target_new': expected a non-empty text, found an empty text"
    ) or (
        f"{mixed}:" in problem
        and "field 'target_new': expected a non-empty text, found an empty text" in problem
    )
    assert "1 of 11 records have the prompt and target of another; see record 11 on line" in warning
    assert [record["prompt"] for record in first] == [f"The employer of person {i} is" for i in range(3)]
    assert first[0]["line"] == 2 and first[0]["consequences"][0]["answer"] == "Oslo"


def test_what_is_shown_of_a_file(emendo_command: Emendo, mixed: Path) -> None:
    shown = " ".join(emendo_command("data", mixed).out.split())
    for part in (
        "11 records in the layout of KnowEdit.",
        "locality, unrelated 22",
        "portability, one hop 11",
        "Not read: locality.Relation_Specificity.ground_truth[1:] (11), ground_truth[1:] (11), tag (11).",
        "Warning: 1 of 11 records have the prompt and target of another",
        "Wrong: 1 record (1 malformed).",
        "field 'target_new': expected a non-empty text, found an empty text",
        "Record 1, line 2 prompt 'The employer of person 0 is' target 'Acme'",
        "consequences one hop: 'The seat of the employer of Bo Li is' -> 'Oslo'",
        "consequences and 1 more",
    ):
        assert part in shown, part
    assert emendo_command("data", mixed, "--limit", 1, "--json").json["records"] == 1


def test_the_built_in_facts_and_what_cannot_be_read(emendo_command: Emendo, tmp_path: Path) -> None:
    figures = emendo_command("data", "atlas", "--limit", 5, "--json").json
    assert (figures["layout"], figures["records"], figures["problems"]) == ("built-in facts", 5, 0)
    assert "does not exist" in emendo_command("data", tmp_path / "none.json", code=2).err
    (tmp_path / "bad.jsonl").write_text('{"prompt": ""}\n')
    assert "no usable record is left" in emendo_command("data", tmp_path / "bad.jsonl", code=2).err
    assert "limit is 0" in emendo_command("data", "atlas", "--limit", 0, code=2).err


def test_texts_are_shown_not_sent(emendo_command: Emendo, tmp_path: Path) -> None:
    raw = {"prompt": "A [red]\x1b[2J\x9b", "target": "b\u202e", "\x1b]0;title\x07": 1, "answer": "x" * 500}
    (tmp_path / "a.jsonl").write_text(
        json.dumps(raw) + '\n{"prompt": "a", "target": "\\u001b[2J", "answer": true}\n'
    )
    said = emendo_command("data", tmp_path / "a.jsonl")
    assert not {char for char in said.out + said.err if not char.isprintable()} - {"\n"}
    assert "A [red]\\x1b[2J\\x9b" in said.out and "\\x1b]0;title\\x07 (1)" in said.out
    assert "x" * 90 + "'..." in said.out and "x" * 91 not in said.out


def test_commands_note_what_is_not_read_and_what_is_doubtful(
    emendo_command: Emendo, model: Path, trained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "facts.jsonl"
    write_records([*records(8), records(1)[0]], data)
    lines = [json.loads(line) | {"source": "x", "split": "y"} for line in data.read_text().splitlines()]
    data.write_text("\n".join(map(json.dumps, lines)))
    train = ("train", "--model", model, "--data", data, "--out", tmp_path / "run", *SHORT)
    evaluate = (
        "evaluate",
        "--editor",
        trained,
        "--data",
        data,
        "--limit",
        9,
        "--no-damage",
        "--no-generated",
    )
    fuse = ("fuse", "--editor", trained, "--data", data, "--out", tmp_path / "fused")
    for command in (train, evaluate, fuse):
        said = emendo_command(*command, "--json").err
        assert said.count("fields that are not read, with the number of records: source (9), split (9).") == 1
        assert (
            said.count("1 of 9 records have the prompt and target of another; see record 9 on line 9.") == 1
        )


def test_records_that_do_not_fit_the_model(
    emendo_command: Emendo, model: Path, trained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "facts.jsonl"
    long = Record("The capital of Bada is", "Oslo", paraphrases=("very " * 400 + "long",))
    write_records([*records(3), long, *records(7)[3:]], data)
    train = ("train", "--model", model, "--data", data, "--out", tmp_path / "run", *SHORT)
    evaluate = ("evaluate", "--editor", trained, "--data", data, "--no-damage", "--no-generated")
    for command in (train, evaluate):
        said = emendo_command(*command, code=2).err
        assert f"{data}:4: The text has" in said and "the model's context is 256" in said
        assert "leave them out with --skip-bad" in said
        assert command == evaluate or not (tmp_path / "run").exists()
        said = emendo_command(*command, "--skip-bad", "--json")
        assert f"and were left out, the first: {data}:4: The text has" in said.err
    assert (
        "change them:"
        in emendo_command(
            "fuse", "--editor", trained, "--data", data, "--out", tmp_path / "fused", code=2
        ).err
    )
