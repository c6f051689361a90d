"""The plots of a comparison: bars of every row beside the paper's figure, and curves where the rows are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emendo.evaluate.intervals import Interval
from emendo.report.plots import BLUE, GREEN, INK, ORANGE, RED, SKY, Format, axes_of, legend, panels, render
from reproduction.mend_paper.claims import success_and_damage
from reproduction.mend_paper.grid import Column, Grid

_LOOKS = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (ORANGE, "D"), (SKY, "v"), (INK, "P"))
_POINTS = (*_LOOKS[:5], (INK, "*"), ("#7f7f7f", "P"))
_WIDE = 5.0  # a perplexity drawdown above this is drawn on a logarithmic scale


def value_of(text: str) -> float:
    """A figure of the paper as a number: ``"<0.001"`` as 0.001 and ``">0.99"`` as 0.99."""
    return float(text.lstrip("<>"))


def bars(grid: Grid, column: Column) -> bytes | None:
    """Edit success on the left and drawdown on the right, a bar for each row; None if nothing has been run."""
    rows = [row for row in grid.preset.rows if grid.results.get((row, column.name))]
    if not rows:
        return None
    figure, (left, right) = panels(10.4, 0.95 + 0.36 * len(rows), 2)
    quoted = [grid.quoted(row, column) for row in rows]
    _bars(left, [grid.figure(row, column.name, "edit_success") for row in rows], BLUE)
    _bars(right, [grid.drawdown(row, column) for row in rows], ORANGE)
    for axes, part in ((left, 0), (right, 1)):
        for at, figures in enumerate(quoted):
            if figures is not None:
                axes.plot(value_of(figures[part]), at, "D", mfc="none", mec=INK, mew=1.3, ms=6, zorder=5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color=INK, alpha=0.12, lw=0.8)
    if any(quoted):
        left.plot([], [], "D", mfc="none", mec=INK, mew=1.3, ms=6, label=f"paper: {column.paper}")
        legend(left, figure)
    left.set_yticks(range(len(rows)), rows)
    right.set_yticks([])
    left.set(xlim=(0, 1.02), xlabel="edit success")
    right.set_xlabel(f"drawdown of {column.drawdown} (0: no damage)")
    right.axvline(0, color=INK, alpha=0.4, lw=1)
    if max(right.get_xlim()) > _WIDE:
        right.set_xscale("symlog", linthresh=1)
    for axes in (left, right):
        axes.xaxis.label.set_color(INK)
    return render(figure)


def curves(grid: Grid) -> bytes | None:
    """A line for each column over the rows' numbers: edit success on the left, drawdown on the right."""
    figure, (left, right) = panels(10.4, 3.4, 2)
    if len(grid.missing()) == len(grid.preset.cells):
        return None
    for column, look in zip(grid.preset.columns, _LOOKS, strict=False):
        quoted = {row: figures for row in grid.preset.rows if (figures := grid.quoted(row, column))}
        successes = {row: grid.figure(row, column.name, "edit_success") for row in grid.preset.rows}
        drawdowns = {row: grid.drawdown(row, column) for row in grid.preset.rows}
        _curve(left, successes, {row: q.success for row, q in quoted.items()}, look, column.name)
        _curve(right, drawdowns, {row: q.drawdown for row, q in quoted.items()}, look, "")
    for axes, name in ((left, "edit success"), (right, f"drawdown of {grid.preset.columns[0].drawdown}")):
        axes.set_xlabel(grid.preset.along, color=INK)
        axes.set_ylabel(name, color=INK)
        axes.grid(color=INK, alpha=0.1, lw=0.8)
    left.set_ylim(-0.03, 1.03)
    legend(left, figure)
    return render(figure)


def _curve(
    axes: Any,
    values: Mapping[str, Interval | None],
    quoted: Mapping[str, str],
    look: tuple[str, str],
    label: str,
) -> None:
    """A column's figures here, with their intervals, and in the paper, dashed."""
    colour, marker = look
    points = [(_number_in(row), value) for row, value in values.items() if value is not None]
    x = [at for at, _ in points]
    axes.fill_between(
        x, [v.low for _, v in points], [v.high for _, v in points], color=colour, alpha=0.15, lw=0
    )
    shown = {"color": colour, "marker": marker, "ms": 5}
    axes.plot(x, [v.mean for _, v in points], lw=1.6, label=label or None, **shown)
    if quoted:
        y = [value_of(text) for text in quoted.values()]
        name = f"{label}, paper" if label else None
        axes.plot([*map(_number_in, quoted)], y, lw=1.1, ls=(0, (4, 3)), mfc="none", label=name, **shown)


def paths(grid: Grid, column: Column, image: Format = "svg") -> bytes | None:
    """Success on the edit prompt against the damage to other answers and to running text, a line for each path.

    Rows that are on no path are single points. None if nothing has been run.
    """
    figure, panes = panels(10.4, 4.4, 2)
    on_paths = {row for rows in grid.preset.paths.values() for row in rows}
    single = {row: (row,) for row in grid.preset.rows if row not in on_paths}
    drawn = False
    for (name, rows), (colour, marker) in zip({**grid.preset.paths, **single}.items(), _POINTS, strict=False):
        points = [point for row in rows if (point := success_and_damage(grid, row, column)) is not None]
        look = {"ms": 13, "ls": "none", "zorder": 4} if name in single else {"ms": 6, "lw": 1.4, "zorder": 3}
        for axes, part in zip(panes, (1, 2), strict=True):
            x, y = [point[part] for point in points], [point[0] for point in points]
            axes.plot(x, y, color=colour, marker=marker, label=name if points else None, **look)
        drawn = drawn or bool(points)
    if not drawn:
        return None
    for axes, text in zip(panes, ("locality KL in nats", "rise of the perplexity"), strict=True):
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_ylim(-0.05, 1.08)
        axes.set_xlabel(f"{text} (0: no damage)", color=INK)
        axes.grid(color=INK, alpha=0.1, lw=0.8)
    panes[0].set_ylabel("success on the edit prompt", color=INK)
    legend(panes[0], figure)
    return render(figure, image)


def memory(grid: Grid) -> bytes | None:
    """Memory that training adds against the size of the model, a line for each row, both on logarithmic scales."""
    figure, axes = axes_of(10.4, 4.2)
    drawn = False
    for row, (colour, marker) in zip(grid.preset.rows, _LOOKS, strict=False):
        points = [
            (size.mean / 1e6, added.mean)
            for column in grid.preset.columns
            if (size := grid.figure(row, column.name, "model_parameters"))
            and (added := grid.figure(row, column.name, "memory"))
            and added.mean > 0
        ]
        drawn = drawn or bool(points)
        x, y = zip(*sorted(points), strict=True) if points else ((), ())
        axes.plot(x, y, color=colour, marker=marker, ms=5, lw=1.6, label=row)
    if not drawn:
        return None
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("parameters of the model, in millions", color=INK)
    axes.set_ylabel("MB while training, above the bare model", color=INK)
    axes.grid(color=INK, alpha=0.1, lw=0.8)
    legend(axes, figure)
    return render(figure)


def _bars(axes: Any, values: Sequence[Interval | None], colour: str) -> None:
    """Horizontal bars with their intervals and their numbers."""
    for at, value in enumerate(values):
        if value is None or not math.isfinite(value.mean):
            text = "-" if value is None else "no number"
            axes.text(0, at, f" {text}", va="center", fontsize=8.5, color=INK)
            continue
        axes.barh(at, value.mean, 0.6, color=colour, alpha=0.85)
        axes.plot([value.low, value.high], [at, at], color=INK, lw=1.3, solid_capstyle="butt")


def _number_in(row: str) -> float:
    return float(row.rpartition(" ")[2])
