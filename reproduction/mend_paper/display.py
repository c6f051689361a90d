"""The output of the command, while it runs and at the end."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from rich.text import Text

from emendo._storage import digest, new_file
from emendo._version import __version__
from emendo.cli._console import emit, note, output
from emendo.cli._progress import show_progress
from emendo.cli._tables import print_table
from emendo.progress import Progress
from reproduction.mend_paper import tables
from reproduction.mend_paper.budgets import EDITORS, Choice, seconds
from reproduction.mend_paper.cells import Cell, Folder, Result
from reproduction.mend_paper.grid import Grid
from reproduction.mend_paper.memory import Memory
from reproduction.mend_paper.page import page
from reproduction.mend_paper.presets import build, every
from reproduction.mend_paper.runner import View


class Shown(View):
    """Prints each cell and its result on standard error, with progress bars in between."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._begin = 0.0

    def cell(self, cell: Cell | Memory, place: int, total: int) -> None:
        """Name the cell."""
        self._begin = time.monotonic()
        note(Text.assemble((f"{place} of {total}", "bold"), f"  {describe(cell)}"))

    def done(self, cell: Cell | Memory, result: Result) -> None:
        """Print the result."""
        self.close()
        names = ("edit_success", "accuracy_drawdown", "perplexity_drawdown", "memory")
        found = [
            f"{name.replace('_', ' ')} {tables.with_interval(result.figures[name])}{' MB' * (name == 'memory')}"
            for name in names
            if name in result.figures
        ]
        note(f"    {'; '.join(found)}; {_minutes(time.monotonic() - self._begin)}")

    def update(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """Move a bar."""
        self._shown().update(task, done, total, figures)

    def report(self, heading: str, figures: Mapping[str, float], remark: str = "") -> None:
        """Print a line of figures."""
        self._shown().report(heading, figures, remark)

    def _shown(self) -> Progress:
        if self._progress is None:
            self._progress = self._stack.enter_context(show_progress())
        return self._progress

    def close(self) -> None:
        """Remove the bars."""
        self._stack.close()
        self._progress = None


def describe(cell: Cell | Memory) -> str:
    """A cell in words, with its estimated time."""
    label = EDITORS.get(cell.editor, cell.editor).partition(",")[0]
    if isinstance(cell, Memory):
        wide = f", GPT-2 type {cell.width} wide" if cell.width else ""
        return (
            f"memory of {label} on {cell.model}{wide}: {cell.steps} steps (about {_minutes(seconds(cell))})"
        )
    special = [f"{name}={value}" for name, value in cell.settings.items()]
    special += [cell.sites] if isinstance(cell.sites, str) and cell.sites != "mlp" else []
    special += [f"{cell.match.times:g} times the matching radius"] if cell.match else []
    special += [f"seed {cell.seed}"] if cell.seed else []
    config = cell.train_config() if cell.trained else None
    steps = f"{config.steps} steps of {config.batch} facts, then " if config else ""
    edits = f"{cell.facts} edits" if cell.k == 1 else f"{cell.facts} facts in edits of {cell.k}"
    extra = f" ({', '.join(special)})" if special else ""
    time = f" (about {_minutes(seconds(cell))})" if seconds(cell) else ""
    return f"{cell.task}, {label}{extra}: {steps}{edits}{time}"


def listing(cells: Sequence[Cell | Memory], latest: Mapping[str, Result], *, as_json: bool) -> None:
    """Print the cells, those that are done, and the estimated time for the rest."""
    plans = {digest(cell.plan()): cell for cell in cells}
    left = sum(seconds(cell) for plan, cell in plans.items() if plan not in latest)
    if as_json:
        rows = [
            {**cell.plan(), "done": plan in latest, "about_seconds": round(seconds(cell))}
            for plan, cell in plans.items()
        ]
        emit({"cells": rows, "about_seconds_left": round(left)})
        return
    for plan, cell in plans.items():
        output().print(f"{'done' if plan in latest else '    '}  {describe(cell)}", soft_wrap=True)
    output().print(f"{len(plans)} cells, about {_minutes(left)} left on two processor cores.")


def write(folder: Folder, choice: Choice, latest: Mapping[str, Result], seeds: int, command: str) -> None:
    """Write the pages: every table with a finished cell, in full, even if only a part was requested.

    Raises:
        StorageError: a page cannot be written.
    """
    whole = replace(choice, tasks=(), editors=())
    grids = [Grid.of(build(name, whole), latest, seeds) for name in every()]
    grids = [grid for grid in grids if len(grid.missing()) < len(grid.preset.cells)]
    info = {
        "versions": f"emendo {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
    }
    texts = {
        "compare.html": page(grids, command, info),
        "compare.md": tables.markdown(grids),
        "compare.csv": tables.comma_separated(grids),
    }
    for name, text in texts.items():
        with new_file(folder.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def show(grids: Sequence[Grid]) -> None:
    """Print the tables."""
    for grid in grids:
        output().print()
        print_table(replace(tables.places(grid), title=grid.preset.title))
        print_table(tables.statements(grid))


def as_values(grids: Sequence[Grid]) -> dict[str, Any]:
    """The tables as JSON values."""
    return {grid.preset.name: tables.values(grid) for grid in grids}


def _minutes(time_taken: float) -> str:
    if time_taken < 60:
        return f"{time_taken:.0f} s"
    minutes = time_taken / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
