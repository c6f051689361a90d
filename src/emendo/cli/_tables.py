"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import rich.table
from rich.text import Text

from emendo.cli._console import output
from emendo.report.tables import Column, Shown, Table, printable, right_aligned, shown

if TYPE_CHECKING:
    from emendo.evaluate import Row

_STYLES = {"good": "green", "bad": "red", "warning": "yellow", "soft": "dim", "strong": "bold", "": ""}


def print_table(table: Table | None) -> None:
    """Print a table on standard output; None prints nothing.

    Cells are never read as rich's markup, and their control characters are shown instead of sent.
    """
    if table is None:
        return
    console = output()
    if table.title:
        console.print(Text(printable(table.title), "bold"))
    if table.columns:
        console.print(terminal_table(table))
    if table.note:
        console.print(Text(printable(table.note), "dim"), soft_wrap=True)


def terminal_table(table: Table) -> rich.table.Table:
    """The table for rich."""
    grid = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=_headed(table))
    for column in table.columns:
        right = right_aligned(column)
        grid.add_column(
            Text(printable(column.name)),
            justify="right" if right else "left",
            no_wrap=right,
            max_width=column.width,
            overflow="fold",
        )
    for row in table.rows:
        if isinstance(row, str):
            grid.add_row(Text(printable(row), "bold"))
        else:
            grid.add_row(*(_cell(value, column) for value, column in zip(row, table.columns, strict=True)))
    return grid


def _headed(table: Table) -> bool:
    return any(column.name for column in table.columns)


def _cell(value: Any, column: Column) -> Text:
    return Text("\n").join(_line(part) for part in shown(value, column))


def _line(part: Shown) -> Text:
    line = Text(part.text, _STYLES[part.tone])
    return line.append(f" {part.aside}" if part.text else part.aside, "dim") if part.aside else line


def before_after(rows: Sequence[Row]) -> None:
    """Print the most probable answers without and with an edit."""
    from emendo.report import figures

    print_table(figures.before_after(rows))


def evaluation(values: Mapping[str, Any]) -> None:
    """Print an evaluation's scores with their intervals and its damage, from ``as_dict()``."""
    from emendo.report import figures

    if "checkpoints" in values:
        print_table(figures.retention(values))
    else:
        print_table(figures.scores(values))
        print_table(figures.damage(values))
        print_table(figures.routing(values))
    print_table(figures.harness(values.get("lm_eval")))
