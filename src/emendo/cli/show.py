"""`emendo show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli.apply import as_values

if TYPE_CHECKING:
    from emendo.ledger import Entry, Ledger

HELP = """Show one edit of a ledger: what it was asked for, what made it and upon what, and what was measured.

\b
Example:
  emendo show 3 --model ./my-model
"""

Number = Annotated[int, typer.Argument(metavar="ID", help="The edit's number, as emendo log shows it.")]


def run(
    id: Number, model: opt.Model = opt.MODEL, ledger: keep.Where = None, as_json: opt.AsJson = False
) -> None:
    """Show an edit."""
    book = keep.find_ledger(model, ledger)
    entry = book.entry(id)
    steps = [step for step in reversed(book.log()) if id in step.edits]
    if as_json:
        values = {**as_values(entry), "active": id in book.head.active, "chat": _chat(book, entry)}
        emit({"edit": values, "operations": [as_values(step) for step in steps]})
        return
    console = output()
    console.print(_facts(book, entry))
    for step in steps:
        forced = " [yellow](forced)[/yellow]" if step.forced else ""
        note = f": {escape(step.note)}" if step.note else ""
        console.print(
            f"\n[bold]{step.kind}[/bold]{forced} as step {step.id} by {escape(step.by)}, {step.at[:19]}{note}",
            soft_wrap=True,
        )
        if step.health:
            console.print(_health(step.health))


def _facts(book: Ledger, entry: Entry) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    place = book.head.active.index(entry.id) + 1 if entry.id in book.head.active else None
    state = "not active" if place is None else f"active, {place} of {len(book.head.active)}"
    table.add_row("edit", f"{entry.id} ({state})")
    for request in entry.requests:
        table.add_row("asked", f"{escape(request['prompt'])} [bold]{escape(request['target'])}[/bold]")
    if _chat(book, entry):
        table.add_row("how", "in the tokenizer's chat template")
    rank = "" if entry.rank is None else f", rank {entry.rank}"
    table.add_row("made by", f"{escape(entry.editor)}, emendo {entry.version}, {entry.made}{rank}")
    numbers = [str(other.id) for other in book.entries() if other.digest in entry.upon]
    if entry.upon:
        table.add_row(
            "made upon", f"edits {', '.join(numbers)}" if len(numbers) < 20 else f"{len(numbers)} edits"
        )
    table.add_row("size", f"{entry.bytes / 1024:,.0f} KB, sha256 {entry.digest[:16]}…")
    return table


def _chat(book: Ledger, entry: Entry) -> bool:
    """Whether the edit was made from prompts in the chat template."""
    from emendo.edits.edit import Edit

    return Edit.from_bytes(book.load(entry.id)).origin.chat


def _health(health: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("measured", "value", "limit"):
        table.add_column(heading, justify="left" if heading == "measured" else "right", style="dim")
    for name, limit in health["limits"].items():
        if health.get(name) is not None:
            table.add_row(name.replace("_", " "), f"{health[name]:.4g}", f"{limit:g}")
    return table
