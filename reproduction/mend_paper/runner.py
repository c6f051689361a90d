"""Run cells: train the editor or read a trained one, measure it, and store the figures."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from emendo._storage import digest, new_file, read_json, write_json
from emendo._version import __version__
from emendo.editors import Editor, editor_class, trained_class
from emendo.editors.ft_kl import FineTuningKl
from emendo.editors.repair import Repair
from emendo.models.sites import Site, find_sites
from emendo.progress import Progress, Silent
from emendo.train import train
from emendo.train.checkpoint import FILE
from reproduction.mend_paper.cells import Cell, Folder, Result
from reproduction.mend_paper.figures import figures
from reproduction.mend_paper.measure import measure
from reproduction.mend_paper.memory import Memory, peak
from reproduction.mend_paper.radius import matching_radius
from reproduction.mend_paper.sources import Bench, Source, probes


class View(Silent):
    """A view that shows nothing; the base class of all views."""

    def cell(self, cell: Cell | Memory, place: int, total: int) -> None:
        """A cell begins."""

    def done(self, cell: Cell | Memory, result: Result) -> None:
        """A cell is done."""

    def training(self) -> Progress:
        """Receives the progress of a training."""
        return self


class Runner:
    """Runs cells, each once, with one task and its model in memory at a time.

    Args:
        folder: the folder of the comparison.
        source: loads a task and its model.
        view: receives each cell and its result.
    """

    def __init__(self, folder: Folder, source: Source, view: View | None = None) -> None:
        self.folder, self.source, self.view = folder, source, view or View()
        self._bench: Bench | None = None

    def run(self, cells: Sequence[Cell | Memory]) -> None:
        """Run every cell whose figures are not yet in the folder, task by task.

        Ctrl-C loses nothing: finished cells are kept, and a training resumes from its last step.

        Raises:
            KeyboardInterrupt: by Ctrl-C.
            EmendoError: something does not fit, or cannot be written.
        """
        each = list({digest(cell.plan()): cell for cell in cells}.values())
        tasks = list(dict.fromkeys(map(_task, each)))
        for place, cell in enumerate(sorted(each, key=lambda cell: tasks.index(_task(cell))), 1):
            key, work = self._plan(cell)
            if self.folder.read(key) is None:
                self.view.cell(cell, place, len(each))
                result = work()
                self.folder.write(key, result, _about())
                self.view.done(cell, result)

    def _plan(self, cell: Cell | Memory) -> tuple[dict[str, Any], Callable[[], Result]]:
        """Everything that a cell's figures depend on, and the function that measures them."""
        if isinstance(cell, Memory):
            return cell.plan(), lambda: peak(cell, *self.source.material(cell.model))
        bench = self._load(cell.task)
        return cell.key(bench.lm.fingerprint, bench.sizes), lambda: self._measured(bench, cell)

    def _measured(self, bench: Bench, cell: Cell) -> Result:
        note = f"ships as {cell.shipped}" if cell.shipped else ""
        if cell.match is not None:
            radius = cell.match.times * self._radius(bench, cell, cell.match.cell)
            cell, note = replace(cell, settings={**cell.settings, "radius": radius}), f"radius {radius:.4g}"
        editor = self.editor(bench, cell)
        task, begin = bench.task, time.monotonic()
        scores = measure(
            bench.lm,
            editor,
            task.test[: cell.facts],
            task.test_passages,
            k=cell.k,
            progress=self.view,
        )
        took = {} if cell.shipped else training_of(editor)
        return Result(figures(scores), took, round(time.monotonic() - begin, 1), note)

    def editor(self, bench: Bench, cell: Cell) -> Editor:
        """A cell's editor, trained here or earlier if the method needs training.

        Raises:
            KeyboardInterrupt: by Ctrl-C; the training's checkpoint is kept.
        """
        if cell.shipped:
            return Editor.from_pretrained(cell.shipped)
        sites = find_sites(bench.lm.model, cell.sites, last=cell.last)
        if cell.editor == Repair.name:  # one matrix
            sites = Repair.default_sites(bench.lm.model)
        editor: Any = self._trained(bench, cell, sites) if cell.trained else _untrained(bench, cell, sites)
        editor = editor.to(bench.lm.device)
        if cell.editor == FineTuningKl.name:
            editor.set_locality(probes(bench.task))
        return editor  # type: ignore[no-any-return]

    def _trained(self, bench: Bench, cell: Cell, sites: tuple[Site, ...]) -> Editor:
        place = self.folder.editor(cell.editor_key(bench.lm.fingerprint, bench.sizes))
        if not place.exists():
            torch.manual_seed(cell.seed)
            editor = trained_class(cell.editor)(sites, cell.config())
            working = place.with_name(f"{place.name}.training")
            working.mkdir(parents=True, exist_ok=True)
            result = train(
                bench.lm,
                editor,
                bench.task.train,
                bench.task.validation,
                cell.train_config(),
                out=working,
                resume=(working / FILE).exists(),
                passages=bench.task.passages,
                progress=self.view.training(),
            )
            if result.stopped == "interrupted":
                raise KeyboardInterrupt
            result.editor.save_pretrained(place)
            shutil.rmtree(working)
        return Editor.from_pretrained(place)

    def _radius(self, bench: Bench, cell: Cell, matched: Cell) -> float:
        """The radius at which a cache's drawdown on the validation data is that of another editor; found once."""
        kept = self.folder.radius(cell.key(bench.lm.fingerprint, bench.sizes))
        if not kept.exists():
            cache, other, task = self.editor(bench, cell), self.editor(bench, matched), bench.task
            radius = matching_radius(bench.lm, cache, other, task.validation, task.passages, self.view)
            with new_file(kept) as temporary:
                write_json(temporary, {"radius": radius})
        return float(read_json(kept)["radius"])

    def _load(self, task: str) -> Bench:
        if self._bench is None or self._bench.task.name != task:
            self._bench = None  # the old model goes before the new one comes
            self._bench = self.source.bench(task)
        return self._bench


def _task(cell: Cell | Memory) -> str:
    return "" if isinstance(cell, Memory) else cell.task


def _untrained(bench: Bench, cell: Cell, sites: tuple[Site, ...]) -> Editor:
    torch.manual_seed(cell.seed)
    return editor_class(cell.editor)(sites, cell.config())


def training_of(editor: Editor) -> dict[str, Any]:
    """The cost of training an editor."""
    size = sum(parameter.numel() for parameter in editor.parameters())
    if not editor.needs_training:
        return {}
    return {"parameters": size, **{name: editor.info[name] for name in ("steps", "seconds", "stopped")}}


def _about() -> dict[str, Any]:
    """The date, the versions and the machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"emendo": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
    }
