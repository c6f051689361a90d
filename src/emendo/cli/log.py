"""`emendo log`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli._tables import print_table
from emendo.report.tables import Cell, Column, Table

if TYPE_CHECKING:
    from emendo.ledger import Ledger, Operation

HELP = """Show the history of a model's edits, the latest step first: what was done, by whom and when.

\b
Examples:
  emendo log --model ./my-model
  emendo log --model ./my-model --all
"""

Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Show the latest N steps.")]
All = Annotated[bool, typer.Option("--all", help="Show every step.")]


def run(
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    limit: Limit = 20,
    every: All = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show the log."""
    book = shared.find_ledger(model, ledger)
    operations = book.log(None if every else limit)
    count = operations[0].id + 1 if operations else 0
    if as_json:
        values = {"ledger": book.where, "model": book.model, "steps": count}
        emit({**values, "operations": [operation.as_dict() for operation in operations]})
        return
    console = output()
    print_table(_table(book, operations))
    if len(operations) < count:
        console.print(
            f"The latest {len(operations)} of {count:,} steps; --all shows every step.", style="dim"
        )
    console.print(Text.assemble(f"\n{shared.state_line(book.head)} ", (book.where, "dim")), soft_wrap=True)


def _table(book: Ledger, operations: list[Operation]) -> Table:
    single = [operation.edits[0] for operation in operations if len(operation.edits) == 1]
    entries = {entry.id: entry for entry in book.entries(dict.fromkeys(single))}
    tags: dict[int, list[str]] = {}
    for tag in book.tags():
        tags.setdefault(tag.operation, []).append(tag.name)
    rows = []
    for operation in operations:
        edits = operation.edits
        kind = Cell(f"{operation.kind}, forced", tone="warning") if operation.forced else operation.kind
        numbers = ", ".join(map(str, edits)) if len(edits) < 6 else f"{len(edits)} edits"
        request = Cell(shared.requests_line(entries[edits[0]]) if len(edits) == 1 else "")
        what = (request, Cell(operation.note, tone="soft")) if operation.note else request
        when, named = operation.at[:16].replace("T", " "), ", ".join(tags.get(operation.id, ()))
        rows.append((operation.id, kind, numbers, what, operation.by, when, named))
    headings = ("kind", "edit", "request", "by", "when", "tag")
    return Table((Column("step", "count"), *map(Column, headings)), rows)
