"""`emendo checkout`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli.apply import as_values

HELP = """Go back (or forth) to the edits of another state of a model, as a new step; nothing is erased.

\b
Example:
  emendo checkout release-1 --model ./my-model
"""

State = Annotated[str, typer.Argument(metavar="STATE", help="A tag, or a step's number.")]


def run(
    state: State,
    model: opt.Model = opt.MODEL,
    ledger: keep.Where = None,
    by: keep.By = None,
    reason: keep.Note = "",
    as_json: opt.AsJson = False,
) -> None:
    """Check a state out."""
    book = keep.find_ledger(model, ledger)
    step = book.checkout(keep.state_of(state), by=by, note=reason)
    if as_json:
        emit(as_values(step))
        return
    output().print(keep.say_state(step))
