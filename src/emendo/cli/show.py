"""`emendo show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output

if TYPE_CHECKING:
    from emendo.ledger import Entry, Ledger

HELP = """Show one edit of a ledger: its requests, how it was made, and the guard's figures.

\b
Example:
  emendo show 3 --model ./my-model
"""

Number = Annotated[int, typer.Argument(metavar="ID", help="The edit's number, as emendo log shows it.")]


def run(
    id: Number, model: opt.Model = opt.MODEL, ledger: shared.Where = None, as_json: opt.AsJson = False
) -> None:
    """Show an edit."""
    book = shared.find_ledger(model, ledger)
    entry, operations, active = book.entry(id), book.operations_of(id), book.head.active
    if as_json:
        values = {**entry.as_dict(), "active": id in active}
        emit({"edit": values, "operations": [operation.as_dict() for operation in operations]})
        return
    console = output()
    console.print(_facts(book, entry, active))
    for step in operations:
        line = Text.assemble((f"\n{step.kind}", "bold"), (" (forced)" if step.forced else "", "yellow"))
        line.append(f" as step {step.id} by {step.by}, {step.at[:19]}")
        console.print(line.append(f": {step.note}" if step.note else ""), soft_wrap=True)
        if step.health:
            console.print(_health(step.health))


def _facts(book: Ledger, entry: Entry, active: tuple[int, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    state = f"active, {active.index(entry.id) + 1} of {len(active)}" if entry.id in active else "not active"
    table.add_row("edit", f"{entry.id} ({state})")
    for request in entry.requests:
        table.add_row("request", Text.assemble(f"{request['prompt']} ", (request["target"], "bold")))
    if entry.chat:
        table.add_row("framing", "in the tokenizer's chat template")
    rank = "" if entry.rank is None else f", rank {entry.rank}"
    table.add_row("made by", f"{entry.editor}, emendo {entry.version}, {entry.made}{rank}")
    if entry.upon:
        earlier = book.made_upon(entry)
        numbers = ", ".join(map(str, earlier))
        table.add_row("made upon", f"edits {numbers}" if len(earlier) < 20 else f"{len(earlier)} edits")
    table.add_row("size", f"{entry.bytes / 1024:,.0f} KB, sha256 {entry.digest[:16]}…")
    return table


def _health(health: Mapping[str, Any]) -> Table:
    from emendo.ledger.health import read_figures

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("measured", "value", "limit"):
        table.add_column(heading, justify="left" if heading == "measured" else "right", style="dim")
    values, limits = read_figures(health), read_figures(health.get("limits"))
    for name, value in values.items():
        limit = f"{limits[name]:g}" if name in limits else ""
        table.add_row(name.replace("_", " "), f"{value:.4g}", limit)
    return table
