"""`emendo undo`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli.apply import as_values

HELP = """Take the last N active edits off. The weights are then exactly what they were before; nothing is erased from
the ledger, and emendo checkout goes back.

\b
Example:
  emendo undo 2 --model ./my-model
"""

Count = Annotated[int, typer.Argument(metavar="N", min=1, help="How many.")]


def run(
    count: Count = 1,
    model: opt.Model = opt.MODEL,
    ledger: keep.Where = None,
    by: keep.By = None,
    reason: keep.Note = "",
    as_json: opt.AsJson = False,
) -> None:
    """Undo edits."""
    book = keep.find_ledger(model, ledger)
    step = book.undo(count, by=by, note=reason)
    if as_json:
        emit(as_values(step))
        return
    for entry in reversed(book.entries(step.edits)):
        output().print(f"[red]taken off[/red] edit {entry.id}: {keep.wishes(entry)}", soft_wrap=True)
    output().print(keep.say_state(step))
