"""`emendo show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli._tables import print_table
from emendo.report.tables import Cell, Column, Table

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
    print_table(_facts(book, entry, active))
    for step in operations:
        line = Text.assemble((f"\n{step.kind}", "bold"), (" (forced)" if step.forced else "", "yellow"))
        line.append(f" as step {step.id} by {step.by}, {step.at[:19]}")
        console.print(line.append(f": {step.note}" if step.note else ""), soft_wrap=True)
        if step.health:
            print_table(_health(step.health))


def _facts(book: Ledger, entry: Entry, active: tuple[int, ...]) -> Table:
    state = f"active, {active.index(entry.id) + 1} of {len(active)}" if entry.id in active else "not active"
    rows = [("edit", f"{entry.id} ({state})")]
    rows += [("request", f"{request['prompt']} → {request['target']}") for request in entry.requests]
    if entry.chat:
        rows.append(("framing", "in the tokenizer's chat template"))
    own = dict.fromkeys(r["separator"] for r in entry.requests if "separator" in r)
    rows += [("separator", repr(between)) for between in own]
    rank = "" if entry.rank is None else f", rank {entry.rank}"
    rows.append(("made by", f"{entry.editor}, emendo {entry.version}, {entry.made}{rank}"))
    if entry.upon:
        earlier = book.made_upon(entry)
        numbers = ", ".join(map(str, earlier))
        rows.append(("made upon", f"edits {numbers}" if len(earlier) < 20 else f"{len(earlier)} edits"))
    rows.append(("size", f"{entry.bytes / 1024:,.0f} KB, sha256 {entry.digest[:16]}…"))
    return Table((Column(""), Column("")), rows)


def _health(health: Mapping[str, Any]) -> Table:
    from emendo.ledger.health import read_figures

    values, limits = read_figures(health), read_figures(health.get("limits"))
    rows = [
        (Cell(name.replace("_", " "), tone="soft"), value, limits.get(name)) for name, value in values.items()
    ]
    return Table((Column("measured"), Column("value", "number"), Column("limit", "number", missing="")), rows)
