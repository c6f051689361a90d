"""`emendo evaluate --out`, `evaluate show` and `evaluate compare` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.samples import Emendo
from emendo.cli import _evaluate as evaluating


@pytest.fixture(scope="module")
def options(model: Path, facts: Path) -> tuple[object, ...]:
    rest = ("--data", facts, "--limit", 3, "--no-generated", "--no-damage")
    return ("--editor", "ft", "--model", model, "--set", "steps=2", *rest)


@pytest.fixture(scope="module")
def measured(emendo_command: Emendo, options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluations") / "first"
    emendo_command("evaluate", *options, "--out", out)
    return out


def test_a_run_is_kept_and_not_measured_again(
    emendo_command: Emendo, options, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {file.name for file in measured.iterdir()} == {
        *("run.json", "records.jsonl", "answers.parquet", "edits.parquet", "report.html", "summary.md")
    }
    monkeypatch.delattr(evaluating, "evaluate")
    again = emendo_command("evaluate", *options, "--out", measured, "--json")
    assert "nothing is measured again" in again.err
    (measured / "report.html").unlink()
    emendo_command("evaluate", *options, "--out", measured)
    assert (measured / "report.html").exists()
    assert again.json == emendo_command("evaluate", "show", measured, "--json").json
    said = emendo_command("evaluate", *options, "--together", 2, "--out", measured, code=2).err
    assert "--overwrite" in said
    summary = (measured / "summary.md").read_text(encoding="utf-8")
    assert "emendo evaluate --editor ft" in summary and "| generalisation |" in summary


def test_worst_and_one_record(emendo_command: Emendo, measured: Path) -> None:
    table = emendo_command("evaluate", "show", measured, "--worst", 2).out
    assert table.count("made-") == 2
    rows = emendo_command("evaluate", "show", measured, "--worst", 3, "--by", "kl.locality", "--json").json
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    one = emendo_command("evaluate", "show", measured, "--record", "made-1").out
    for wanted in ("edit", "paraphrase", "neighbour", "in context", "unchanged", "rank"):
        assert wanted in one
    by_number = emendo_command("evaluate", "show", measured, "--record", "2", "--json").json
    assert by_number["record"]["id"] == "made-1"
    assert [o["kind"] for o in by_number["outcomes"]][:2] == ["edit", "paraphrase"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--record", "nobody"), "no record 'nobody'"),
        (("--worst", "1", "--by", "fame"), "no score 'fame'"),
        (("--worst", "0"), "'--worst'"),
    ],
)
def test_what_is_not_there(
    emendo_command: Emendo, measured: Path, more: tuple[str, ...], message: str
) -> None:
    assert message in emendo_command("evaluate", "show", measured, *more, code=2).err


@pytest.mark.slow
def test_two_runs_side_by_side(
    emendo_command: Emendo, options, measured: Path, facts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    emendo_command("evaluate", *options, "--set", "lr=0.05", "--out", other)
    lines = emendo_command("evaluate", "compare", measured, other, "--json").json
    found = {(line["group"], line["name"]): line["found"] for line in lines}
    gap = found["probability", "target_after"]
    assert gap["facts"] == 3 and gap["difference"]["mean"] == pytest.approx(gap["second"] - gap["first"])
    assert gap["difference"]["mean"] > 0
    assert "B - A" in emendo_command("evaluate", "compare", measured, other).out
    same = emendo_command("evaluate", "compare", measured, measured, "--json").json
    assert all(line["found"]["difference"]["mean"] == 0 and line["found"]["p"] == 1 for line in same)
    assert "holds no evaluation" in emendo_command("evaluate", "compare", measured, tmp_path, code=2).err


def test_edits_one_after_the_other(emendo_command: Emendo, options, tmp_path: Path) -> None:
    out = tmp_path / "sequence"
    table = emendo_command("evaluate", *options, "--sequential", "--ask-after", 1, "--out", out).out
    assert "after 1" in table and "after 3" in table and "asked again: locality" in table
    plain = emendo_command("evaluate", "show", out, "--json").json
    assert [point["edits"] for point in plain["checkpoints"]] == [1, 3]
    assert {"after-1.answers.parquet", "after-3.edits.parquet", "right-after.answers.parquet"} <= {
        file.name for file in out.iterdir()
    }
    assert "one after the other" in (out / "report.html").read_text(encoding="utf-8")
    assert "sequence" in emendo_command("evaluate", "compare", out, out, code=2).err
    assert plain["checkpoints"][0]["refused"] is None
    assert "free_generation" not in plain["checkpoints"][0]["retained"]
    strict = emendo_command("evaluate", *options, "--sequential", "--guard", "--json").json
    assert strict["checkpoints"][-1]["refused"] == 3  # an untrained model reaches no target in two steps
    assert "--sequential" in emendo_command("evaluate", *options, "--guard", code=2).err
    both = ("--sequential", "--guard", "--together", 2)
    assert "--together" in emendo_command("evaluate", *options, *both, code=2).err


def test_what_is_generated_after_many_edits_is_kept_and_traced(
    emendo_command: Emendo, options, tmp_path: Path
) -> None:
    wanted, out = [option for option in options if option != "--no-generated"], tmp_path / "sequence"
    table = emendo_command("evaluate", *wanted, "--sequential", "--ask-after", 1, "--out", out).out
    assert "asked again, generated: edit success" in table and "the target and no more" in table
    for page in ("report.html", "summary.md"):
        assert "asked again, generated: the target and no more" in (out / page).read_text(encoding="utf-8")
    last = emendo_command("evaluate", "show", out, "--json").json["checkpoints"][-1]
    rows = emendo_command("evaluate", "show", out, "--after", 3, "--worst", 3, "--json").json
    for name, field in (("edit_success", "generated"), ("edit_success_full", "exact")):
        asked = [outcome for row in rows for outcome in row["outcomes"] if outcome["kind"] == "edit"]
        assert last["retained"]["free_generation"][name]["mean"] == sum(o[field] for o in asked) / 3
    assert all(outcome["text_after"] is not None for row in rows for outcome in row["outcomes"])
    assert "expected" in emendo_command("evaluate", "show", out, "--after", 1, "--record", "1").out
    assert "after 1, 3 edits" in emendo_command("evaluate", "show", out, "--after", 2, code=2).err
    assert emendo_command("evaluate", "show", out, "--after", 3).out


def test_tasks_of_the_harness(emendo_command: Emendo, options, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = (*options, "--lm-eval", "arc_easy,piqa", "--lm-eval-limit", 5)
    monkeypatch.setattr("emendo.evaluate.harness.find_spec", lambda name: None)
    assert "pip install 'emendo[lm-eval]'" in emendo_command("evaluate", *asks, code=2).err
    monkeypatch.setattr("emendo.evaluate.harness.find_spec", lambda name: object())
    said = emendo_command("evaluate", *asks, "--limit", 1)  # one at a time: nothing is asked
    assert "not measured: edits one at a time" in said.out
    assert "--lm-eval names" in emendo_command("evaluate", *options, "--lm-eval-limit", 5, code=2).err
    nowhere = ("--lm-eval", "mine", "--lm-eval-tasks", "nowhere")
    assert "nowhere is no folder" in emendo_command("evaluate", *options, *nowhere, code=2).err


@pytest.mark.slow
def test_damage_is_looked_for_unless_it_is_not_wanted(
    emendo_command: Emendo, options, tmp_path: Path
) -> None:
    wanted = [option for option in options if option != "--no-damage"]
    text = tmp_path / "text.txt"
    text.write_text("A line of plain text that has more than eight words in it.\n", encoding="utf-8")
    seen = emendo_command("evaluate", *wanted, "--limit", 1, "--text", text, "--json").json["damage"]
    assert {"perplexity", "ability", "ability_grammar"} <= seen.keys()
    assert seen["perplexity"]["clean"] > 1
    printed = emendo_command("evaluate", *wanted, "--limit", 1).out
    assert "perplexity of plain text" in printed and "questions of other kinds" in printed
    assert "elsewhere" not in emendo_command("evaluate", *options, "--limit", 1).out
    assert "--text" in emendo_command("evaluate", *options, "--text", text, code=2).err


def test_what_is_not_used_is_counted_once(
    emendo_command: Emendo, options, facts: Path, tmp_path: Path
) -> None:
    lines = facts.read_text(encoding="utf-8").splitlines()[:3]
    more = [json.loads(line) | {"note": "x"} for line in lines]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*more, {"prompt": "only"}]), encoding="utf-8")
    wanted = [
        *options,
        "--limit",
        4,
        "--data",
        data,
        "--skip-bad",
        "--together",
        2,
        "--out",
        tmp_path / "run",
    ]
    unused = emendo_command("evaluate", *wanted, "--json").json["protocol"]["not_used"]
    assert unused["fields"] == {"note": 3}
    assert sum(unused["records"].values()) == 1
    assert unused["records of an incomplete last group"] == 1
    summary = (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
    assert summary.count("| not used: fields: note | 3 |") == 1
    assert "not used: fields: note" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
