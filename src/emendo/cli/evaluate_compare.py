"""`emendo evaluate compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import emit, output

if TYPE_CHECKING:
    from emendo.evaluate.inspect import Line

HELP = """Put two evaluations of the same facts side by side.

Takes two folders that emendo evaluate --out wrote and prints, for each score that both have, the two means, their
difference fact by fact with its 95% interval, and how often chance alone gives one as large (a sign-flip test).

\b
Example:
  emendo evaluate compare runs/first-measured runs/second-measured
"""

First = Annotated[Path, typer.Argument(metavar="A", help="The folder of an evaluation.")]
Second = Annotated[Path, typer.Argument(metavar="B", help="The folder of another one.")]

_SIGNIFICANT = 0.05


def run(first: First, second: Second, as_json: opt.AsJson = False) -> None:
    """Compare two evaluations."""
    from emendo.evaluate.inspect import side_by_side
    from emendo.evaluate.run_folder import RunFolder

    lines = side_by_side(*(RunFolder.open(folder).evaluation() for folder in (first, second)))
    if as_json:
        emit([asdict(line) for line in lines])
        return
    _table(lines, str(first), str(second))


def _table(lines: list[Line], first: str, second: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("score", overflow="fold")
    for name in ("A", "B", "B - A (95%)", "p", "facts"):
        table.add_column(name, justify="right", no_wrap=True)
    group = None
    for line in lines:
        if line.group != group:
            group = line.group
            table.add_row(f"[bold]{group.replace('_', ' ')}[/bold]")
        found, gap = line.found, line.found.difference
        colour = ""
        if found.p < _SIGNIFICANT and line.better and gap.mean:
            colour = "green" if gap.mean * line.better > 0 else "red"
        shown = f"{gap.mean:+.4g} ({gap.low:+.4g} to {gap.high:+.4g})"
        table.add_row(
            line.name.replace("_", " "),
            f"{found.first:.4g}",
            f"{found.second:.4g}",
            f"[{colour}]{shown}[/{colour}]" if colour else shown,
            f"{found.p:.2g}",
            str(found.facts),
        )
    output().print(table)
    output().print(
        f"[dim]A: {escape(first)}, B: {escape(second)}; green and red: better and worse with p < {_SIGNIFICANT}, each "
        "score by itself, without correction for looking at many[/dim]"
    )
