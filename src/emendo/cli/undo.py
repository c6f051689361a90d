"""`emendo undo`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output

HELP = """Take the last N active edits off. The weights are then exactly what they were before them. Nothing is erased
from the ledger: emendo checkout returns to any earlier state.

\b
Example:
  emendo undo 2 --model ./my-model
"""

Count = Annotated[int, typer.Argument(metavar="N", min=1, help="Number of edits.")]


def run(
    count: Count = 1,
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    by: shared.By = None,
    reason: shared.Note = "",
    as_json: opt.AsJson = False,
) -> None:
    """Undo edits."""
    book = shared.find_ledger(model, ledger)
    step = book.undo(count, by=by, note=reason)
    if as_json:
        emit(step.as_dict())
        return
    for entry in reversed(book.entries(step.edits)):
        line = Text.assemble(("taken off", "red"), f" edit {entry.id}: ", shared.requests_line(entry))
        output().print(line, soft_wrap=True)
    output().print(shared.state_line(step))
