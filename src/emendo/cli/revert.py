"""`emendo revert`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output

HELP = """Take one edit off, at any position among the active ones.

The weights are then exactly those of the base model with the other edits. Edits that were made while this one was
active may rely on it: they are listed, and every remaining edit is measured again.

\b
Example:
  emendo revert 3 --model ./my-model
"""

Number = Annotated[int, typer.Argument(metavar="ID", help="The edit's number, as emendo log shows it.")]


def run(
    id: Number,
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    by: shared.By = None,
    reason: shared.Note = "",
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Revert an edit."""
    from emendo.cli._loading import load_model

    shared.find_ledger(model, ledger).entry(id)  # fails before the model is loaded
    work = shared.open_workspace(load_model(model, dtype, device), ledger)
    step, found = work.revert(id, by=by, note=reason)
    later = work.ledger.later_upon(id)
    if as_json:
        made_upon = [entry.id for entry in later]
        emit({"operation": step.as_dict(), "made_upon_it": made_upon, "examination": found.as_dict()})
        return
    console = output()
    entry = work.ledger.entry(id)
    line = Text.assemble(("taken off", "red"), f" edit {id}: ", shared.requests_line(entry))
    console.print(line, soft_wrap=True)
    if later:
        numbers = ", ".join(str(entry.id) for entry in later)
        console.print(f"Made while it was active: edits {numbers}.", soft_wrap=True)
        lost = {outcome.entry.id for outcome in found.lost}
        for entry in later:
            if entry.id in lost:
                line = Text.assemble(("no longer holds:", "yellow"), f" edit {entry.id}: ")
                note(line.append(shared.requests_line(entry)))
    elif found.outcomes:
        console.print("No active edit was made while it was active.")
    console.print(f"{shared.state_line(step)} {shared.examination_line(found)}", soft_wrap=True)
