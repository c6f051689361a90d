"""`emendo doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output, status
from emendo.cli.apply import as_values

if TYPE_CHECKING:
    from emendo.ledger import Check, Operation
    from emendo.ledger.guard import Examination

HELP = """Examine a model with all its active edits: does each of them still hold, and what became of everything else.

\b
Examples:
  emendo doctor --model ./my-model
  emendo doctor --model ./my-model --plot health.png
"""

Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the health over the steps, as .png or .svg."),
]


def run(
    model: opt.Model = opt.MODEL,
    ledger: keep.Where = None,
    plot: Plot = None,
    probes: keep.Probes = None,
    passage: keep.Passage = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Examine a ledger."""
    from emendo.cli._loading import load_model
    from emendo.errors import RequestError

    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise RequestError(f"--plot {plot} must end in .png or .svg.")
    keep.find_ledger(model, ledger)  # before the model is loaded for nothing
    work = keep.open_workspace(load_model(model, dtype, device), ledger, probes=probes, passage=passage)
    with status("Asking the model with all its edits"):
        found = work.examine(keep=True)
    if plot is not None:
        _draw(plot, work.ledger.log(), work.ledger.checks())
    if as_json:
        holdings = [{"edit": h.entry.id, "reached": h.reached, "holds": h.holds} for h in found.holdings]
        emit({**found.as_dict(), "operation": found.operation, "holdings": holdings})
        return
    console = output()
    if found.holdings:
        console.print(_table(found))
    console.print(keep.summary(found), soft_wrap=True)
    if plot is not None:
        console.print(f"Drawn to {plot}.", soft_wrap=True)


def _table(found: Examination) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("edit", justify="right")
    table.add_column("asked for")
    table.add_column("holds")
    for holding in found.holdings:
        right, asked = sum(holding.reached), len(holding.reached)
        part = f" {right} of {asked}" if asked > 1 else ""
        sign = "[green]✓[/green]" if holding.holds else "[red]✗[/red]"
        table.add_row(str(holding.entry.id), keep.wishes(holding.entry), f"{sign}{part}")
    return table


def _draw(file: Path, steps: Sequence[Operation], checks: Sequence[Check]) -> None:
    """Health over the steps, written to a file."""
    from emendo._storage import new_file
    from emendo.report._health_plot import health_plot

    form: Literal["svg", "png"] = "svg" if file.suffix == ".svg" else "png"
    image = health_plot([as_values(step) for step in steps], [as_values(check) for check in checks], form)
    with new_file(file) as temporary:
        temporary.write_bytes(image)
