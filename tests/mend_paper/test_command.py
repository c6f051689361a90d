"""The reproduction's command on a tiny task: tables, pages, lists, and going on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from reproduction.mend_paper import __main__, budgets, claims, paper, presets, runner, tasks
from reproduction.mend_paper.budgets import Budget, Choice
from reproduction.mend_paper.grid import Column, Preset
from reproduction.mend_paper.presets import PRESETS

from cli.samples import Emendo
from mend_paper.tiny import TRAINING, task

COLUMN = Column("made up", "tiny llama", paper.WIKITEXT, "perplexity")


@pytest.fixture(scope="module", autouse=True)
def tiny_preset(model: Path) -> Iterator[None]:
    """The presets are one table over a tiny task, with MEND and a cache matched to it."""

    def build(choice: Choice) -> Preset:
        cells = {
            (label, "made up"): choice.cell("tiny", editor)
            for editor, label in (("mend", "MEND"), ("cache", "Cache, eps*"))
            if choice.wants("tiny", editor)
        }
        claim = claims.edits_better("MEND", "Cache, eps*")
        return Preset(
            "table4", "Tiny", "A table.", (COLUMN,), ("MEND", "Cache, eps*"), cells, paper.TABLE4, (claim,)
        )

    def make(name: str, *_: object) -> tasks.Task:
        return task("tiny", str(model), prose=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "tiny", make)
        patch.setitem(budgets.BUDGETS, "tiny", Budget(TRAINING, 4, 2))
        patch.setitem(budgets.SETTINGS, ("tiny", "mend"), {"rank": 2})
        patch.setattr("reproduction.mend_paper.radius.FACTS", 1)
        patch.setattr("reproduction.mend_paper.radius._HALVINGS", 1)
        patch.setattr(presets, "PRESETS", {"table4": build})
        yield


@pytest.fixture(scope="module")
def out(emendo_command: Emendo, tiny_preset: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("compare")
    answer = emendo_command("compare", "--preset", "table4", "--out", folder)
    assert re.search(r"1 of 2  tiny, MEND \(rank=2\): 4 steps of 2 facts, then 4 edits \(about", answer.err)
    assert "2 of 2  tiny, Cache (1 times the matching radius): 4 edits" in answer.err
    assert re.search(r"edit success \d\.\d{3} .*perplexity drawdown", answer.err)
    assert "here: tiny llama" in answer.out
    assert "paper: distilGPT-2" in answer.out
    assert "0.86 / 0.225" in answer.out
    assert re.search(r"(yes|no)  made up: edit success of MEND is", answer.out)
    return folder


@pytest.mark.slow
def test_pages_are_written(out: Path) -> None:
    html, text, table = ((out / f"compare.{kind}").read_text() for kind in ("html", "md", "csv"))
    assert "<svg" in html
    assert f"python -m reproduction.mend_paper --preset table4 --out {out}" in html
    assert "| MEND | **" in text
    assert "not run" not in text
    assert table.startswith(
        "table,row,column,seed,figure,value,low,high,paper\ntable4,MEND,made up,0,edit_success,"
    )


@pytest.mark.slow
def test_a_part_of_a_table_leaves_the_page_whole(emendo_command: Emendo, out: Path) -> None:
    answer = emendo_command("compare", "--preset", "table4", "--out", out, "--editors", "cache")
    assert re.search(r"MEND +-\s", answer.out)
    assert "| MEND | **" in (out / "compare.md").read_text()
    assert "not run" not in (out / "compare.md").read_text()


def test_a_second_call_runs_nothing(
    emendo_command: Emendo, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure", lambda *_, **__: pytest.fail("a cell ran again"))
    found = emendo_command("compare", "--preset", "all", "--out", out, "--json").json["table4"]
    assert [(cell["row"], cell["column"]) for cell in found["cells"]] == [
        ("MEND", "made up"),
        ("Cache, eps*", "made up"),
    ]
    (here,) = found["cells"][0]["here"]
    assert 0 <= here["edit_success"]["low"] <= here["edit_success"]["mean"] <= 1
    assert found["cells"][0]["paper"] == {"success": "0.86", "drawdown": "0.225"}
    assert found["cells"][1]["paper"] is None
    assert len(found["statements"]) == 1


def test_the_list(emendo_command: Emendo, out: Path) -> None:
    seeds = ("compare", "--preset", "table4", "--out", out, "--list", "--seeds", "2")
    lines = emendo_command(*seeds).out.splitlines()
    assert [line[:10] for line in lines] == [
        "done  tiny",
        "      tiny",
        "done  tiny",
        "      tiny",
        "4 cells, a",
    ]
    listed = emendo_command(*seeds, "--json").json
    assert [cell["done"] for cell in listed["cells"]] == [True, False, True, False]
    assert listed["about_seconds_left"] >= 0


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(
    emendo_command: Emendo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = runner.measure, []

    def once(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "measure", once)
    monkeypatch.setattr(runner, "matching_radius", lambda *_: 0.5)
    asked = ("compare", "--preset", "table4", "--out", tmp_path / "c", "--scale", "0.5")
    answer = emendo_command(*asked, code=130)
    assert "not run" in answer.out
    again = f"python -m reproduction.mend_paper --preset table4 --out {tmp_path / 'c'} --scale 0.5"
    assert f"Continue with: {again}" in answer.err
    assert "not run" in (tmp_path / "c" / "compare.md").read_text()
    monkeypatch.setattr(runner, "measure", measure)
    answer = emendo_command(*asked)
    assert "not run" not in answer.out
    assert "tiny, MEND" not in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "table9"], "There is no preset 'table9'; there are: table4"),
        (
            ["--preset", "table4", "--tasks", "tiny, huge"],
            "There is no task 'huge' here; there are: atlas-bert",
        ),
        (["--preset", "table4", "--editors", "rome"], "There is no editor 'rome' here"),
        (["--preset", "table4", "--scale", "0"], "--scale must be above 0"),
        (["--preset", "table4", "--seeds", "0"], "Invalid value for '--seeds'"),
        (
            ["--preset", "table4", "--editors", "ft"],
            "Nothing of table4 is left with these --tasks and --editors",
        ),
    ],
)
def test_bad_options_are_explained(emendo_command: Emendo, options: list[str], message: str) -> None:
    answer = emendo_command("compare", *options, code=2)
    assert message in " ".join(answer.err.split())


def test_a_task_without_its_file_is_named_before_any_work(
    emendo_command: Emendo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.FILES, "tiny", ("wikitext2-valid.txt",))
    for data in ([], ["--data", tmp_path]):
        answer = emendo_command("compare", "--preset", "table4", "--out", tmp_path / "c", *data, code=2)
        assert "The task 'tiny' reads wikitext2-valid.txt, but" in " ".join(answer.err.split())
        assert "1 of 2" not in answer.err
    assert tasks.FILES.keys() <= tasks.TASKS.keys() | {"tiny"}
    assert not (tmp_path / "c").exists()


def test_the_help_names_every_preset() -> None:
    listed = re.findall(r"^  (\w+)   +\w", __main__.HELP, re.MULTILINE)
    assert listed == [*PRESETS]
