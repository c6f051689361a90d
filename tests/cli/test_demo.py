"""The demo from end to end on a tiny model: whole, repeated, stopped, with other settings."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.samples import Answer, Emendo
from emendo import Edit, Editor
from emendo.cli import _demo as measuring
from emendo.cli import _training
from emendo.cli._console import Interrupted
from emendo.data import read_records
from emendo.editors import DEFAULT, library
from emendo.evaluate import evaluate
from emendo.train import loop

OPTIONS = ("--train", "--steps", 4, "--limit", 40, "--facts", 3)
FILES = {
    *(
        "run.json",
        "checkpoint.safetensors",
        "history.json",
        "editor",
        "edit",
        "evaluation.json",
        "report.html",
    )
}


@pytest.fixture(autouse=True, scope="module")
def few_to_validate_on() -> Iterator[None]:
    """The demo chooses its editor on a hundred facts; here on eight, to be quick."""
    real = loop.held_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "held_out", lambda lm, records, *more: real(lm, records[:8], *more))
        yield


@pytest.fixture(scope="module")
def finished(
    emendo_command: Emendo, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Answer]:
    """A demo that has run once; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, emendo_command("demo", "--model", model, "--out", out, *OPTIONS)


@pytest.fixture
def demo(emendo_command: Emendo, model: Path, tmp_path: Path) -> Any:
    """Runs the demo in a folder of this test."""

    def call(*args: object, code: int = 0) -> Answer:
        out = ("--out", tmp_path / "demo")
        return emendo_command("demo", "--model", model, *out, *(args or OPTIONS), code=code)

    return call


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, real: Any) -> list[int]:
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(0)
        return real(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_the_demo(finished: tuple[Path, Answer]) -> None:
    out, said = finished
    assert {path.name for path in out.iterdir()} == FILES
    for text in ("edited prompt", "paraphrases", "near neighbours", "unrelated", "3 facts", "What next"):
        assert text in said.out
    assert sum(line.startswith("  emendo ") for line in said.out.splitlines()) == 3
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Australia" in html and "<svg" in html and 'src="http' not in html
    figures = json.loads((out / "evaluation.json").read_text())["figures"]
    assert figures["records"] == 3 and figures["generated"] is not None
    assert figures["damage"]["perplexity"]["edits"] == 3 and "perplexity of plain text" in said.out


@pytest.mark.slow
def test_repeated_it_trains_and_measures_nothing_again(
    demo: Any, finished: tuple[Path, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    shutil.copytree(finished[0], out)
    steps = count(monkeypatch, loop, "training_step", loop.training_step)
    measured = count(monkeypatch, measuring, "evaluate", evaluate)
    again = demo()
    assert (len(steps), len(measured)) == (0, 0)
    assert "Using the editor" in again.err
    assert again.out.replace(str(out), "OUT") == finished[1].out.replace(str(finished[0]), "OUT")
    assert (out / "report.html").read_bytes() == (finished[0] / "report.html").read_bytes()
    more = demo("--train", "--steps", 4, "--limit", 40, "--facts", 4)
    assert (len(steps), len(measured)) == (0, 1)
    assert "4 facts" in more.out


def test_its_edit_and_its_editor_can_be_used(
    emendo_command: Emendo, finished: tuple[Path, Answer], tmp_path: Path
) -> None:
    out, said = finished
    edit, editor = Edit.from_pretrained(out / "edit"), Editor.from_pretrained(out / "editor")
    record = next(r for r in read_records("atlas", split="test") if r.id == measuring.EXAMPLE)
    prompt = edit.origin.requests[0].prompt
    assert prompt == record.prompt and edit.origin.requests[0].target == record.answer
    assert f"P({record.answer})" in said.out
    assert edit.origin.fingerprint == editor.fingerprint
    assert "with the edit" in emendo_command("generate", "--edit", out / "edit", prompt).out
    emendo_command("edit", "--editor", out, "The capital of France is", "Lyon", "--out", tmp_path / "my-edit")


@pytest.mark.slow
def test_the_example_is_learnt_from_nowhere() -> None:
    shown = {measuring.EXAMPLE, *measuring.NEIGHBOURS}
    subjects = {r.subject for r in read_records("atlas", split="test") if r.id in shown}
    assert len(subjects) == len(shown)
    for split in ("train", "validation"):
        assert all(r.subject not in subjects for r in read_records("atlas", split=split))


@pytest.mark.slow
def test_a_stopped_demo_goes_on(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loop.training_step, []

    def stop(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stop)
        said = demo(code=130)
    assert "step 2 is saved" in said.err and "emendo demo --train --out" in said.err
    assert "--resume" not in said.err.split("Continue with")[1]
    steps = count(monkeypatch, loop, "training_step", real)
    assert "Continuing" in demo().err
    assert len(steps) == 2

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "evaluate", interrupt)
        said = demo("--train", "--steps", 4, "--limit", 40, "--facts", 2, code=130)
    assert "the editor is kept" in said.err
    assert len(steps) == 2


@pytest.mark.slow
def test_other_settings_train_anew_and_other_runs_are_left_alone(
    demo: Any,
    emendo_command: Emendo,
    model: Path,
    finished: tuple[Path, Answer],
    trained: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(finished[0], tmp_path / "demo")
    assert "other settings; training anew" in demo("--train", "--steps", 5, "--limit", 40, "--facts", 3).err
    assert Editor.from_pretrained(tmp_path / "demo" / "editor").info["steps"] == 5
    said = emendo_command("demo", "--train", "--model", model, "--out", trained, code=2)
    assert "not a run of the demo" in said.err


@pytest.fixture
def on_the_shelf(finished: tuple[Path, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The demo's own editor as one that ships."""
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "shipped")
    shutil.copytree(finished[0] / "editor", tmp_path / "shipped" / "mend-tiny")
    return "mend-tiny"


@pytest.mark.slow
def test_with_an_editor_that_ships_nothing_is_trained(
    demo: Any, on_the_shelf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count(monkeypatch, loop, "training_step", loop.training_step)
    measured = count(monkeypatch, measuring, "evaluate", evaluate)
    first = demo("--facts", 2)
    assert (len(steps), len(measured)) == (0, 1)
    assert {path.name for path in (tmp_path / "demo").iterdir()} == FILES - {
        "checkpoint.safetensors",
        "history.json",
        "editor",
    }
    assert "2 facts" in first.out and "What next" in first.out and "--editor" not in first.out
    again = demo("--facts", 2)
    assert len(measured) == 1 and again.out == first.out


@pytest.mark.slow
def test_one_can_be_trained_where_another_ships(
    demo: Any, on_the_shelf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo("--facts", 2)
    steps = count(monkeypatch, loop, "training_step", loop.training_step)
    demo("--train", "--steps", 2, "--limit", 40, "--facts", 2)
    assert len(steps) == 2


def test_an_editor_that_was_trained_is_not_replaced(
    demo: Any, on_the_shelf: str, finished: tuple[Path, Answer], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "demo")
    assert "already holds something" in demo("--facts", 2, code=2).err


def test_without_one_an_editor_is_trained(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "none")

    def stop(*_: Any, **__: Any) -> Any:
        raise Interrupted("training")

    monkeypatch.setattr(_training, "carry_out", stop)
    said = demo("--facts", 2, code=130).err
    assert "so one is trained first" in said and "Stopped: training" in said


def test_edit_takes_the_editor_that_ships_or_a_method_without_training(
    emendo_command: Emendo, on_the_shelf: str, model: Path, tmp_path: Path
) -> None:
    prompt = ("The capital of France is", "Lyon")
    ways = ("edit", *prompt, "--model", model, "--json")
    assert "Using mend-tiny" in emendo_command(*ways, "--out", tmp_path / "by-default").err
    by_name = emendo_command(*ways, "--editor", on_the_shelf, "--out", tmp_path / "by-name")
    assert Edit.from_pretrained(tmp_path / "by-default").deltas.keys()
    for one, other in zip(
        Edit.from_pretrained(tmp_path / "by-default").deltas.values(),
        Edit.from_pretrained(tmp_path / "by-name").deltas.values(),
        strict=True,
    ):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    assert "Using" not in by_name.err
    shutil.rmtree(tmp_path / "shipped")
    said = emendo_command(*ways).err
    assert (
        f"Using {DEFAULT}, the best method that needs no training" in said and "emendo train --model" in said
    )


def test_the_editors_are_listed_with_their_figures(
    emendo_command: Emendo, on_the_shelf: str, tmp_path: Path
) -> None:
    head = tmp_path / "shipped" / on_the_shelf / "editor.json"
    value = json.loads(head.read_text())
    value["info"]["figures"] = {"facts": {"edit_success": 0.5, "generalisation": 0.25, "locality": True}}
    head.write_text(json.dumps(value))
    said = emendo_command("editors").out
    assert on_the_shelf in said and "ships with emendo" in said and "0.500" in said and "0.250" in said
    assert emendo_command("editors", "--json").json[0]["name"] == on_the_shelf
    shutil.rmtree(tmp_path / "shipped")
    assert "Train one" in emendo_command("editors").err
