"""Whatever commit e4a7985 wrote still loads, and says the same (tests/data/e4a7985/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import emendo
from emendo.cli import app

FILES = Path(__file__).parent / "data" / "e4a7985"
TRAINED = ("mend", "ke", "enn", "meta-sgd", "meta-curvature")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy, so that no command writes beside the originals."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("method", TRAINED)
def test_a_trained_editor_loads_and_edits(method: str) -> None:
    lm = emendo.load(str(FILES / "model"))
    editor = emendo.Editor.from_pretrained(FILES / f"run-{method}" / "editor")
    assert editor.name == method
    edit = editor.edit(lm, "The capital of Bada is", "Oslo")
    assert all(float(delta.norm()) > 0 for delta in edit.deltas.values())


@pytest.mark.parametrize("name", ["edit", "second", "lora", "fused"])
def test_an_edit_loads_and_fits_the_model(name: str) -> None:
    lm = emendo.load(str(FILES / "model"))
    edit = emendo.Edit.from_pretrained(FILES / name)
    assert edit.origin.requests[0].prompt.startswith("The capital of B")
    with edit.applied(lm):
        lm.generate("The capital of Bada is", max_new_tokens=2)


def test_generate_says_the_same(files: Path) -> None:
    said = run(
        *("generate", "The capital of Bada is", "--json", "--dtype", "float32"),
        *("--model", files / "model", "--edit", files / "edit"),
    )
    before = json.loads((files / "generate.json").read_text())
    assert json.loads(said)["after"] == before["after"]
    assert json.loads(said)["before"] == before["before"]


def test_the_ledger_opens_with_its_steps_and_tag(files: Path) -> None:
    steps = json.loads(run("log", "--model", files / "model", "--json"))["operations"]
    assert [step["kind"] for step in steps] == ["revert", "apply", "undo", "apply", "apply", "begin"]
    assert steps[0]["active"] == [3]
    run("undo", "--model", files / "model")
    run("checkout", "good", "--model", files / "model")
    steps = json.loads(run("log", "--model", files / "model", "--json"))["operations"]
    assert steps[0]["active"] == [3] and len(steps) == 8


def test_a_run_folder_is_known_as_finished(files: Path) -> None:
    result = json.loads(run("train", "--resume", "--out", files / "run-mend", "--json"))
    assert result["steps"] == 6 and result["editor"] == "mend"


def test_the_figures_of_an_evaluation_are_read_again(files: Path) -> None:
    shown = run("evaluate", "show", files / "evaluation")
    printed = json.loads((files / "evaluation.json").read_text())
    success = printed["teacher_forced"]["edit_success"]["mean"]
    assert f"{success:.1%}" in shown or f"{success:.3f}" in shown
