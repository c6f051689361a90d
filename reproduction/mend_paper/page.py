"""All tables on one self-contained HTML page, each figure beside the paper's, with plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emendo.report._render import inline, render_page
from reproduction.mend_paper import plots, tables
from reproduction.mend_paper.figures import PROTOCOL
from reproduction.mend_paper.grid import Grid


def page(grids: Sequence[Grid], command: str, info: Mapping[str, str]) -> str:
    """The page as text.

    Args:
        grids: the tables.
        command: that made it.
        info: name -> value, shown as they are.
    """
    return render_page(
        "compare.html.j2",
        "reproduction.mend_paper",
        title=tables.TITLE,
        about=tables.ABOUT,
        sections=[_section(grid) for grid in grids],
        protocol=PROTOCOL,
        command=command,
        info=info,
    )


def _section(grid: Grid) -> dict[str, Any]:
    return {
        "name": grid.preset.name,
        "title": grid.preset.title,
        "places": tables.places(grid),
        "statements": tables.statements(grid),
        "plots": list(_plots(grid)),
        "details": tables.details(grid),
    }


def _plots(grid: Grid) -> Iterator[tuple[str, Any]]:
    """Headings and plots of the cells that have been run."""
    if any(grid.figure(*place, "memory") for place in grid.results):
        found = {"Memory against the size of the model": plots.memory(grid)}
    elif grid.preset.paths:
        found = {
            f"Edit success and damage along each path, {column.here}": plots.paths(grid, column)
            for column in grid.preset.columns
        }
    elif grid.preset.along:
        found = {f"Along {grid.preset.along}": plots.curves(grid)}
    else:
        found = {
            f"{column.name}: {column.here}": plots.bars(grid, column)
            for column in grid.preset.columns
            if column.here
        }
    for heading, plot in found.items():
        if plot is not None:
            yield heading, inline(plot)
