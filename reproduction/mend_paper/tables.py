"""The tables of a run: figures as the paper writes them, each above the paper's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from emendo.evaluate.intervals import Interval
from emendo.report.tables import NO_NUMBER, Cell, Column, Table, to_csv, to_markdown
from reproduction.mend_paper import grid as data
from reproduction.mend_paper.cells import finite
from reproduction.mend_paper.figures import PROTOCOL
from reproduction.mend_paper.grid import Grid
from reproduction.mend_paper.paper import Quoted

TITLE = "The tables of the MEND paper, made here"
ABOUT = (
    "The models and data here are smaller than the paper's, and others; its figures stand beside ours to compare "
    "orderings and gaps, not digits."
)

NOTHING, NOT_RUN = "-", "not run"
"""Shown where a table has no such figure, and where its cell has not been run."""

DETAILS = {
    "edit_success": "edit success (ES)",
    "success": "on the edit prompt",
    "generalisation": "on paraphrases",
    "accuracy_drawdown": "accuracy drawdown",
    "accuracy_drawdown_near": "on neighbours",
    "accuracy_drawdown_far": "on unrelated prompts",
    "perplexity_drawdown": "perplexity drawdown",
    "locality_kl": "locality KL",
    "unchanged": "unchanged",
    "drift_kl": "drift of predictions, KL",
    "drift_unchanged": "unchanged by training",
    "drift_task_loss": "drift of the task loss",
    "seconds_per_edit": "seconds an edit",
    "rank": "rank",
    "relative_norm": "size of an edit",
}
"""The figures of the second table and their headings."""


def number(value: float) -> str:
    """A figure with three decimals, as in the paper, or fewer where it is large."""
    if not math.isfinite(value):
        return NO_NUMBER
    if 0 < value < 0.001:
        return "<0.001"
    if -0.0005 < value <= 0:
        return "0.000"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def with_interval(value: Interval | None) -> str:
    """A figure with its interval, where it has one."""
    if value is None:
        return NOTHING
    if not math.isfinite(value.mean) or value.low == value.high:
        return number(value.mean)
    return f"{number(value.mean)} ({number(value.low)} to {number(value.high)})"


def places(grid: Grid) -> Table:
    """The first table: edit success and drawdown, or memory, at each place; the paper's figures below ours."""
    columns = [c for c in grid.preset.columns if c.here or _is_quoted(grid, c)]
    rows = [[row, *(_place(grid, row, column) for column in columns)] for row in grid.preset.rows]
    heads = [Column("; ".join(_heads(grid, column))) for column in columns]
    return Table((Column(""), *heads), rows, note=f"{grid.preset.text} {legend(grid)}")


def _is_quoted(grid: Grid, column: data.Column) -> bool:
    return any(grid.quoted(row, column) for row in grid.preset.rows)


def _heads(grid: Grid, column: data.Column) -> Iterator[str]:
    if column.here:
        yield f"here: {column.here}"
    if _is_quoted(grid, column):
        yield f"paper: {column.paper or column.name}"


def _place(grid: Grid, row: str, column: data.Column) -> tuple[Cell, ...]:
    """The lines of a place."""
    cells = []
    if column.here:
        found, ranges = _here(grid, row, column)
        cells += [Cell(found, tone="strong"), *([Cell(ranges, tone="soft")] if ranges else [])]
    if (quoted := grid.quoted(row, column)) is not None:
        cells.append(Cell(f"{'paper: ' if column.here else ''}{' / '.join(quoted)}", tone="soft"))
    return tuple(cells) or (Cell(NOTHING),)


def _here(grid: Grid, row: str, column: data.Column) -> tuple[str, str]:
    """The figures of this run, and their intervals."""
    if (row, column.name) not in grid.preset.cells:
        return NOTHING, ""
    if not grid.results.get((row, column.name)):
        return NOT_RUN, ""
    memory = grid.figure(row, column.name, "memory")
    if memory is not None:
        return f"{memory.mean:.0f} MB", ""
    pair = grid.pair(row, column)
    found = " / ".join(NOTHING if value is None else number(value.mean) for value in pair)
    ranges = (NOTHING if v is None else f"{number(v.low)} to {number(v.high)}" for v in pair)
    return found, " / ".join(ranges)


def legend(grid: Grid) -> str:
    """How to read the first table."""
    if grid.preset.cells and not any("memory" in r.figures for rs in grid.results.values() for r in rs):
        over = f", over {grid.seeds()} seeds: mean, lowest and highest" if grid.seeds() > 1 else ""
        kinds = " or ".join(dict.fromkeys(f"of {column.drawdown}" for column in grid.preset.columns))
        return f"Edit success (ES) / drawdown (DD, {kinds}; more is worse), with 95% intervals{over}."
    return "Highest resident memory while training, above that of the bare model."


def statements(grid: Grid) -> Table | None:
    """Every expected ordering, and whether it holds; None where there are none."""
    marks = {True: Cell("yes", tone="good"), False: Cell("no", tone="bad"), None: Cell("?", tone="soft")}
    rows = [(marks[statement.holds], statement.text) for statement in grid.statements()]
    return Table((Column(""), Column("")), rows) if rows else None


def details(grid: Grid) -> Table | None:
    """Every cell that has been run, with all its figures and the cost of its training; None where there are none."""
    seen = {name for results in grid.results.values() for r in results for name in r.figures}
    names = {key: name for key, name in DETAILS.items() if key in seen}
    rows = []
    for row, column in _in_order(grid):
        results = grid.results.get((row, column.name), ())
        if not results or "memory" in results[0].figures:
            continue
        took, note = results[0].training, results[0].note
        training = f"{took['steps']} steps, {took['seconds']:.0f} s" if took else NOTHING
        size = f"{took['parameters'] / 1e6:.2f} M" if took else NOTHING
        found = [with_interval(grid.figure(row, column.name, name)) for name in names]
        rows.append([f"{row}, {column.name}", *found, training, size, note or NOTHING])
    heads = ("", *names.values(), "training", "parameters", "note")
    return Table([Column(name) for name in heads], rows) if rows else None


def _in_order(grid: Grid) -> Iterator[tuple[str, data.Column]]:
    """The places, column by column."""
    return ((row, column) for column in grid.preset.columns for row in grid.preset.rows)


def markdown(grids: Sequence[Grid]) -> str:
    """All tables, with their remarks and the definition of each figure."""
    parts = [f"# {TITLE}", ABOUT]
    for grid in grids:
        parts.append(f"## {grid.preset.title}")
        found = (places(grid), statements(grid), details(grid))
        parts += [to_markdown(table).strip() for table in found if table is not None]
    parts += [
        "## How each figure is defined",
        "\n".join(f"- `{name}`: {text}." for name, text in PROTOCOL.items()),
    ]
    return "\n\n".join(parts) + "\n"


def values(grid: Grid) -> dict[str, Any]:
    """A table as JSON values: every place with its figures here, one set for each seed, and the paper's."""
    return {
        "title": grid.preset.title,
        "cells": [
            {
                "row": row,
                "column": column.name,
                "here": [finite(result) for result in grid.results.get((row, column.name), ())],
                "paper": quoted and quoted._asdict(),
            }
            for row, column in _in_order(grid)
            if (quoted := grid.quoted(row, column)) or (row, column.name) in grid.preset.cells
        ],
        "statements": [{"holds": s.holds, "text": s.text} for s in grid.statements()],
    }


def comma_separated(grids: Sequence[Grid]) -> str:
    """One line for every figure of every cell and seed, beside the paper's edit success and drawdown."""
    names = ("table", "row", "column", "seed", "figure", "value", "low", "high", "paper")
    rows = []
    for grid in grids:
        for row, column in _in_order(grid):
            quoted = grid.quoted(row, column) or Quoted("", "")
            given = {"edit_success": quoted.success, f"{column.drawdown}_drawdown": quoted.drawdown}
            for seed, result in enumerate(grid.results.get((row, column.name), ())):
                for name, value in result.figures.items():
                    numbers = (value.mean, value.low, value.high)
                    rows.append(
                        (grid.preset.name, row, column.name, seed, name, *numbers, given.get(name, ""))
                    )
    return to_csv(Table([Column(name) for name in names], rows))
