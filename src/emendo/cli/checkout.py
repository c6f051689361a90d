"""`emendo checkout`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output

HELP = """Activate the edits of another state of a model, earlier or later, as a new step; nothing is erased.

\b
Example:
  emendo checkout release-1 --model ./my-model
"""

State = Annotated[str, typer.Argument(metavar="STATE", help="A tag, or a step's number.")]


def run(
    state: State,
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    by: shared.By = None,
    reason: shared.Note = "",
    as_json: opt.AsJson = False,
) -> None:
    """Check a state out."""
    book = shared.find_ledger(model, ledger)
    step = book.checkout(shared.state_of(state), by=by, note=reason)
    if as_json:
        emit(step.as_dict())
        return
    output().print(shared.state_line(step))
