"""`emendo log`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli.apply import as_values

if TYPE_CHECKING:
    from emendo.ledger import Ledger, Operation

HELP = """Show what was done to a model, the latest first: each step, who took it and when, and what the guard found.

\b
Example:
  emendo log --model ./my-model
"""

Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="The last N steps only.  [default: all]")
]


def run(
    model: opt.Model = opt.MODEL,
    ledger: keep.Where = None,
    limit: Limit = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show the log."""
    book = keep.find_ledger(model, ledger)
    steps = book.log(limit)
    if as_json:
        emit({"ledger": book.where, "model": book.model, "operations": [as_values(step) for step in steps]})
        return
    console = output()
    console.print(_table(book, steps))
    console.print(f"\n{keep.say_state(book.head)} [dim]{escape(book.where)}[/dim]", soft_wrap=True)


def _table(book: Ledger, steps: list[Operation]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("step", "", "edit", "what", "by", "when", "tag"):
        table.add_column(
            heading, justify="right" if heading in ("step", "edit") else "left", no_wrap=heading != "what"
        )
    entries = {entry.id: entry for entry in book.entries()}
    tags: dict[int, list[str]] = {}
    for tag in book.tags():
        tags.setdefault(tag.operation, []).append(tag.name)
    for step in steps:
        named = escape(", ".join(tags.get(step.id, ())))
        kind = f"[yellow]{step.kind}, forced[/yellow]" if step.forced else step.kind
        numbers = ", ".join(map(str, step.edits)) if len(step.edits) < 6 else f"{len(step.edits)} edits"
        what = keep.wishes(entries[step.edits[0]]) if len(step.edits) == 1 else ""
        if step.note:
            what += f"\n[dim]{escape(step.note)}[/dim]"
        table.add_row(str(step.id), kind, numbers, what, escape(step.by), _minute(step.at), named)
    return table


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")
