"""`emendo doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from emendo._outputs import PLOT
from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output, status
from emendo.cli._tables import print_table
from emendo.report.tables import Cell, Column, Table

if TYPE_CHECKING:
    from emendo.ledger import Check, Operation
    from emendo.ledger.guard import Examination

HELP = """Examine a model with all its active edits: does each still hold, and how far has everything else moved.

\b
Examples:
  emendo doctor --model ./my-model
  emendo doctor --model ./my-model --plot health.png
"""

Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Plot the health over the steps, as .png or .svg; an older plot of emendo is replaced.",
    ),
]


def run(
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    plot: Plot = None,
    probes: shared.Probes = None,
    passage: shared.Passage = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Examine a ledger."""
    from emendo.cli._loading import load_model
    from emendo.cli._paths import claim
    from emendo.errors import RequestError

    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise RequestError(f"--plot {plot} must end in .png or .svg.")
    claim(plot, PLOT, model=model, ledger=ledger, inputs=[probes, passage])
    shared.find_ledger(model, ledger)  # fails before the model is loaded
    work = shared.open_workspace(load_model(model, dtype, device), ledger, probes=probes, passage=passage)
    with status("Measuring the model with all its edits"):
        found = work.examine(keep=True)
    if plot is not None:
        _plot(plot, work.ledger.log(), work.ledger.checks())
    if as_json:
        outcomes = [{"edit": o.entry.id, "reached": o.reached, "holds": o.holds} for o in found.outcomes]
        emit({**found.as_dict(), "operation": found.operation, "holdings": outcomes})
        return
    console = output()
    if found.outcomes:
        print_table(_table(found))
    console.print(shared.examination_line(found), soft_wrap=True)
    if plot is not None:
        console.print(f"Plotted to {plot}.", soft_wrap=True)


def _table(found: Examination) -> Table:
    rows = []
    for outcome in found.outcomes:
        reached, requests = sum(outcome.reached), len(outcome.reached)
        part = f"{reached} of {requests}" if requests > 1 else ""
        holds = Cell(outcome.holds, "verdict", aside=part)
        rows.append((str(outcome.entry.id), shared.requests_line(outcome.entry), holds))
    return Table((Column("edit"), Column("request"), Column("holds", "verdict")), rows)


def _plot(file: Path, operations: Sequence[Operation], checks: Sequence[Check]) -> None:
    """Write the plot of the health to a file."""
    from emendo._storage import new_file
    from emendo.report._health_plot import health_plot

    form: Literal["svg", "png"] = "svg" if file.suffix == ".svg" else "png"
    image = health_plot([step.as_dict() for step in operations], [check.as_dict() for check in checks], form)
    with new_file(file) as temporary:
        temporary.write_bytes(image)
