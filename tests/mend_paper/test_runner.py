"""Cells are carried out once, and a stopped run goes on where it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reproduction.mend_paper import runner
from reproduction.mend_paper.cells import Cell, Folder, Match, Result
from reproduction.mend_paper.figures import figures
from reproduction.mend_paper.measure import measure
from reproduction.mend_paper.memory import Memory
from reproduction.mend_paper.presets import OBJECTIVES
from reproduction.mend_paper.runner import Runner, View
from reproduction.mend_paper.sources import probes

from emendo._storage import digest
from emendo.data import Record
from emendo.editors import Editor
from emendo.evaluate.intervals import Interval
from emendo.progress import Progress
from emendo.train import train
from mend_paper.tiny import SETTINGS, Tiny, mend, task


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))


class Log(View):
    """Counts what was done."""

    def __init__(self) -> None:
        self.cells: list[Cell | Memory] = []
        self.results: list[Result] = []
        self.trainings = 0

    def cell(self, cell: Cell | Memory, place: int, total: int) -> None:
        self.cells.append(cell)

    def done(self, cell: Cell | Memory, result: Result) -> None:
        self.results.append(result)

    def training(self) -> Progress:
        self.trainings += 1
        return self


def test_a_cell_is_trained_measured_and_kept(tmp_path: Path) -> None:
    log, source = Log(), Tiny()
    Runner(Folder(tmp_path), source, log).run([mend()])
    (result,) = log.results
    bench = source.bench("tiny")
    (place,) = (tmp_path / "editors").iterdir()
    scores = measure(bench.lm, Editor.from_pretrained(place), bench.task.test)
    again, expected = dict(result.figures), figures(scores)
    assert again.pop("seconds_per_edit").mean > 0
    expected.pop("seconds_per_edit")
    assert again == expected
    assert result.training["steps"] == 4
    assert result.training["parameters"] == sum(p.numel() for p in Editor.from_pretrained(place).parameters())
    assert Folder(tmp_path).latest() == {digest(mend().plan()): result}


@pytest.mark.slow
def test_the_losses_of_enn_and_the_statistics_of_mend_make_rows(tmp_path: Path) -> None:
    """Every row of eq5, and MEND with either kind of statistics; ENN reports both drifts, of its own model."""
    log = Log()
    rows = [mend(editor="enn", settings=settings) for settings in OBJECTIVES.values()]
    rows += [mend(settings={**SETTINGS, "statistics": kind}) for kind in ("running", "train-set")]
    Runner(Folder(tmp_path), Tiny(), log).run(rows)
    assert [log.cells, len(log.results)] == [rows, len(rows)]
    for cell, result in zip(rows, log.results, strict=True):
        drifts = [result.figures.get(f"drift_{name}") for name in ("kl", "unchanged", "task_loss")]
        assert all(drift is not None for drift in drifts) == (cell.editor == "enn")
        assert 0 <= result.figures["edit_success"].mean <= 1
    task_losses = [result.figures["drift_task_loss"].mean for result in log.results[: len(OBJECTIVES)]]
    assert len(set(task_losses)) == len(OBJECTIVES)


@pytest.mark.slow
def test_nothing_is_done_twice(tmp_path: Path) -> None:
    first, second = Log(), Log()
    Runner(Folder(tmp_path), Tiny(), first).run([mend(), mend(facts=2), mend(seed=1), mend()])
    assert [len(first.cells), first.trainings] == [3, 2]  # another number of test facts needs no other editor
    Runner(Folder(tmp_path), Tiny(), second).run([mend(seed=1), mend(facts=3)])
    assert second.cells == [mend(facts=3)]
    assert second.trainings == 0


@pytest.mark.slow
def test_tasks_are_loaded_one_after_the_other(tmp_path: Path) -> None:
    source, log = Tiny(), Log()
    cells = [mend(), mend(task="other"), mend(seed=1)]
    Runner(Folder(tmp_path), source, log).run(cells)
    assert source.loaded == ["tiny", "other"]
    assert log.cells == [cells[0], cells[2], cells[1]]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["training", "measuring"])
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    whole, log = Folder(tmp_path / "whole"), Log()
    Runner(whole, Tiny()).run([mend(), mend(seed=1)])

    broken = Folder(tmp_path / "broken")
    Runner(broken, Tiny()).run([mend()])
    with monkeypatch.context() as patch:
        if when == "training":
            patch.setattr(runner, "train", _stops_after(2))
        else:
            patch.setattr(runner, "measure", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            Runner(broken, Tiny()).run([mend(), mend(seed=1)])
    assert [*broken.latest()] == [digest(mend().plan())]
    Runner(broken, Tiny(), log).run([mend(), mend(seed=1)])
    assert log.cells == [mend(seed=1)]
    assert log.trainings == (when == "training")
    for plan, result in whole.latest().items():
        found = broken.latest()[plan]
        for name, value in result.figures.items():
            if name != "seconds_per_edit":
                assert found.figures[name] == value, name
    assert not list((tmp_path / "broken" / "editors").glob("*.training"))


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _stops_after(steps: int) -> object:
    """Training that Ctrl-C stops."""

    def stopping(lm: object, editor: Editor, *args: object, **options: object) -> object:
        seen: list[object] = []
        adapt = type(editor).adapt

        def count(self: Editor, outcome: object, *, validation: bool = False) -> None:
            adapt(self, outcome, validation=validation)
            seen.extend([] if validation else [outcome])
            if len(seen) == steps and not validation:
                os.kill(os.getpid(), signal.SIGINT)

        editor.__class__ = type("Counting", (type(editor),), {"adapt": count})
        return train(lm, editor, *args, **options)

    return stopping


def test_an_editor_without_training(tmp_path: Path) -> None:
    log = Log()
    cell = Cell("tiny", "cache", {"radius": 0.5}, facts=2)
    Runner(Folder(tmp_path), Tiny(), log).run([cell])
    assert log.trainings == 0
    assert not (tmp_path / "editors").exists()
    assert log.results[0].training == {}
    assert log.results[0].figures["success"].mean == 1.0
    assert "rank" not in log.results[0].figures


@pytest.mark.slow
def test_a_repair_changes_its_own_matrix(tmp_path: Path) -> None:
    log = Log()
    Runner(Folder(tmp_path), Tiny(), log).run([Cell("tiny", "repair", facts=2)])
    (result,) = log.results
    assert result.training == {}
    assert result.figures["rank"].mean >= 1.0
    assert result.figures["relative_norm"].mean > 0.0


@pytest.mark.slow
def test_the_radius_of_a_cache_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def radius(lm: object, cache: Editor, other: Editor, *_: object) -> float:
        found.append(f"{cache.name} as {other.name}")
        return 0.25

    monkeypatch.setattr(runner, "matching_radius", radius)
    log, cell = Log(), Cell("tiny", "cache", facts=2, match=Match(mend()))
    Runner(Folder(tmp_path), Tiny(), log).run(
        [cell, replace(cell, match=Match(mend(), 2.0)), replace(cell, facts=3), mend()]
    )
    assert found == ["cache as mend"]
    assert [result.note for result in log.results] == ["radius 0.25", "radius 0.5", "radius 0.25", ""]
    assert log.trainings == 1  # the editor that is matched is the cell's own


def test_what_shall_stay() -> None:
    told = probes(task(prose=True))
    assert told[:32:4] == [record.neighbours[0] for record in task().train]
    assert (told[-1].prompt, told[-1].answer) == (
        "Two and two are four, and the capital",
        "of Lima is Old Town; Oslo is another.",
    )


@pytest.mark.slow
def test_the_start_follows_from_the_seed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        torch.manual_seed(len(folder) + id(folder) % 7)
        Runner(Folder(tmp_path / folder), Tiny()).run([mend(settings={**SETTINGS, "alpha": 0.01})])
    a, b = (Folder(tmp_path / folder).latest() for folder in ("a", "b"))
    for plan, result in a.items():
        assert result.figures["relative_norm"] == b[plan].figures["relative_norm"]


@pytest.mark.slow
def test_memory_is_measured_elsewhere_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def peak(cell: Memory, model: object, facts: Sequence[Record]) -> Result:
        asked.append((cell, model, len(facts)))
        return Result({"memory": Interval(1.0, 1.0, 1.0)})

    monkeypatch.setattr(runner, "peak", peak)
    source = Tiny()
    for _ in range(2):
        Runner(Folder(tmp_path), source).run([Memory("small", "mend", 64), mend()])
    assert asked == [(Memory("small", "mend", 64), "small", 8)]
    assert source.loaded == ["tiny", "tiny"]  # the model of a memory cell is loaded in its own process
    assert Folder(tmp_path).latest()[digest(Memory("small", "mend", 64).plan())].figures["memory"].mean == 1.0
