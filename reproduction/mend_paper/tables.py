"""Tables as text: figures as the paper writes them, Markdown to read and CSV to calculate with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from emendo.evaluate.intervals import Interval
from reproduction.mend_paper.cells import finite
from reproduction.mend_paper.figures import PROTOCOL
from reproduction.mend_paper.grid import Column, Grid, Statement

TITLE = "The tables of the MEND paper, made here"
ABOUT = (
    "The models and data here are smaller than the paper's, and others; its figures stand beside ours to compare "
    "orderings and gaps, not digits."
)

NOTHING, NOT_RUN, NO_NUMBER = "-", "not run", "no number"
"""Shown where a table has no such figure, where its cell has not been run, and where the figure is not finite."""

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


def here(grid: Grid, row: str, column: Column) -> tuple[str, str]:
    """What stands at a place, edit success and drawdown or memory, and the intervals of both."""
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


def paper(grid: Grid, row: str, column: Column) -> str:
    """What the paper has at a place."""
    quoted = grid.quoted(row, column)
    return NOTHING if quoted is None else " / ".join(quoted)


def headings(grid: Grid) -> list[tuple[Column, bool]]:
    """The columns of the first table: each of this run and of the paper, where there is one; True for the paper's."""
    columns = []
    for column in grid.preset.columns:
        columns += [(column, False)] if column.here else []
        columns += [(column, True)] if any(grid.quoted(row, column) for row in grid.preset.rows) else []
    return columns


def heading(column: Column, quoted: bool) -> str:
    """What stands above a column."""
    return f"paper: {column.paper or column.name}" if quoted else f"here: {column.here}"


def legend(grid: Grid) -> str:
    """How to read the first table."""
    if grid.preset.cells and not any("memory" in r.figures for rs in grid.results.values() for r in rs):
        over = f", over {grid.seeds()} seeds: mean, lowest and highest" if grid.seeds() > 1 else ""
        kinds = " or ".join(dict.fromkeys(f"of {column.drawdown}" for column in grid.preset.columns))
        return f"Edit success (ES) / drawdown (DD, {kinds}; more is worse), with 95% intervals{over}."
    return "Highest resident memory while training, above that of the bare model."


def mark(statement: Statement) -> str:
    """Yes, no, or not known."""
    return {True: "yes", False: "no", None: "?"}[statement.holds]


def markdown(grids: Sequence[Grid]) -> str:
    """All tables, with their remarks and the definition of each figure."""
    parts = [f"# {TITLE}", ABOUT]
    for grid in grids:
        parts += _markdown(grid)
    parts += [
        "## How each figure is defined",
        "\n".join(f"- `{name}`: {text}." for name, text in PROTOCOL.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(grid: Grid) -> Iterator[str]:
    columns = headings(grid)
    rows = []
    for row in grid.preset.rows:
        cells = []
        for column, quoted in columns:
            if quoted:
                cells.append(paper(grid, row, column))
                continue
            found, ranges = here(grid, row, column)
            cells.append(f"**{found}**" + (f"<br>{ranges}" if ranges else ""))
        rows.append([row, *cells])
    yield f"## {grid.preset.title}"
    yield f"{grid.preset.text} {legend(grid)}"
    yield _rows(["", *(heading(*column) for column in columns)], rows)
    if statements := grid.statements():
        yield "\n".join(f"- **{mark(s)}**: {s.text}" for s in statements)
    if lines := [*details(grid)]:
        yield _rows(detail_names(grid), lines)


def details(grid: Grid) -> Iterator[list[str]]:
    """The second table: every cell that has been run, with all its figures and the cost of its training."""
    for column in grid.preset.columns:
        for row in grid.preset.rows:
            results = grid.results.get((row, column.name), ())
            if not results or "memory" in results[0].figures:
                continue
            cells = [with_interval(grid.figure(row, column.name, name)) for name in _names(grid, keys=True)]
            took, note = results[0].training, results[0].note
            training = f"{took['steps']} steps, {took['seconds']:.0f} s" if took else NOTHING
            size = f"{took['parameters'] / 1e6:.2f} M" if took else NOTHING
            yield [f"{row}, {column.name}", *cells, training, size, note or NOTHING]


def detail_names(grid: Grid) -> list[str]:
    """What stands above the second table."""
    return ["", *_names(grid), "training", "parameters", "note"]


def _names(grid: Grid, keys: bool = False) -> list[str]:
    seen = {name for results in grid.results.values() for r in results for name in r.figures}
    return [key if keys else name for key, name in DETAILS.items() if key in seen]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def values(grid: Grid) -> dict[str, Any]:
    """A table as JSON values: every place with its figures here, one set for each seed, and the paper's."""
    places = [(row, column) for column in grid.preset.columns for row in grid.preset.rows]
    return {
        "title": grid.preset.title,
        "cells": [
            {
                "row": row,
                "column": column.name,
                "here": [finite(result) for result in grid.results.get((row, column.name), ())],
                "paper": quoted and quoted._asdict(),
            }
            for row, column in places
            if (quoted := grid.quoted(row, column)) or (row, column.name) in grid.preset.cells
        ],
        "statements": [{"holds": s.holds, "text": s.text} for s in grid.statements()],
    }


def comma_separated(grids: Sequence[Grid]) -> str:
    """One line for every figure of every cell and seed, beside the paper's edit success and drawdown."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "seed", "figure", "value", "low", "high", "paper"])
    for grid in grids:
        for column in grid.preset.columns:
            for row in grid.preset.rows:
                quoted = grid.quoted(row, column)
                given = {
                    "edit_success": quoted.success if quoted else "",
                    f"{column.drawdown}_drawdown": quoted.drawdown if quoted else "",
                }
                for place, result in enumerate(grid.results.get((row, column.name), ())):
                    for name, value in result.figures.items():
                        numbers = [value.mean, value.low, value.high]
                        writer.writerow(
                            [grid.preset.name, row, column.name, place, name, *numbers, given.get(name, "")]
                        )
    return buffer.getvalue()
