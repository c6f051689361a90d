"""The table of edits one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from emendo.cli.console import output
from emendo.cli.show import harness

_FORCED, _FREE = "teacher_forced", "free_generation"
_ROWS = (
    ("right after its edit: edit success", "right_after", _FORCED, "edit_success"),
    ("right after its edit: generalisation", "right_after", _FORCED, "generalisation"),
    ("asked again: edit success", "retained", _FORCED, "edit_success"),
    ("asked again: generalisation", "retained", _FORCED, "generalisation"),
    ("asked again: locality", "retained", _FORCED, "locality"),
    ("asked again, generated: edit success", "retained", _FREE, "edit_success"),
    ("asked again, generated: the target and no more", "retained", _FREE, "edit_success_full"),
    ("asked again, generated: generalisation", "retained", _FREE, "generalisation"),
    ("asked again, generated: locality", "retained", _FREE, "locality"),
)
"""Heading, when it was asked, protocol, score."""


def retention(figures: Mapping[str, Any]) -> None:
    """Print what is left of the edits as they become more, from what ``as_dict()`` of a sequence gives."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    points = figures["checkpoints"]
    table.add_column("one after the other; teacher forced or generated")
    for point in points:
        table.add_column(f"after {point['edits']:,}", justify="right")
    for heading, when, group, name in _ROWS:
        cells = [point[when].get(group, {}).get(name) for point in points]
        if any(cells):
            table.add_row(heading, *(_share(cell) for cell in cells))
    if any(point["refused"] is not None for point in points):
        table.add_row("edits that the guard refused", *(str(point["refused"]) for point in points))
    for name, clean in figures["clean"].items():
        values = [point["damage"].get(name) for point in points]
        table.add_row(f"{name.replace('_', ' ')} (clean {_number(clean)})", *map(_number, values))
    if any(point["relative_norm"] for point in points):
        table.add_row("size of all edits together", *(_size(point["relative_norm"]) for point in points))
    output().print(table)
    output().print(
        f"[dim]in brackets the 95% interval; {figures['seconds_per_edit']:.2f} s for an edit[/dim]"
    )
    harness(figures.get("lm_eval"))


def _share(cell: Mapping[str, float | None] | None) -> str:
    if cell is None or cell["mean"] is None:
        return "[dim]-[/dim]"
    return f"{cell['mean']:.1%} [dim]({cell['low']:.1%} to {cell['high']:.1%})[/dim]"


def _number(value: float | None) -> str:
    return "[dim]no number[/dim]" if value is None else f"{value:.4g}"


def _size(value: float | None) -> str:
    return "[dim]no number[/dim]" if value is None else f"{value:.2%}"
