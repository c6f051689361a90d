"""The scripts of examples/ run, on a tiny model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emendo
from cases import records
from emendo.data import write_records
from emendo.models.lm import LM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def main(tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls an example's main in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path))
    monkeypatch.setattr(emendo, "load", lambda name: tiny_llama, raising=False)

    def call(name: str, **options: Any) -> None:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**options)

    return call


def test_edit_a_fact(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    main("edit_a_fact")
    said = capsys.readouterr().out
    assert "-> 'Lyon'" in said.splitlines()[0]
    assert emendo.Edit.from_pretrained("lyon").origin.requests[0].target == "Lyon"


def test_train_an_editor(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    write_records(records(40), "facts.jsonl")
    main("train_an_editor", data="facts.jsonl", steps=4, rank=4)
    said = capsys.readouterr().out
    assert "4 steps in" in said and "locality: " in said
    assert emendo.Editor.from_pretrained("my-editor").name == "mend"


def test_keep_many_edits(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    main("keep_many_edits")
    said = capsys.readouterr().out
    assert "active: ['The capital of Italy is']" in said
    assert "one batch, three models: [" in said


def test_every_example_is_run() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
