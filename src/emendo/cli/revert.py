"""`emendo revert`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output
from emendo.cli.apply import as_values

HELP = """Take one edit off, wherever it stands among the active ones.

The weights are then exactly those of the base with the other edits. Edits that were made while this one stood in the
model may have relied on it: they are named, and every edit that stays is asked again.

\b
Example:
  emendo revert 3 --model ./my-model
"""

Number = Annotated[int, typer.Argument(metavar="ID", help="The edit's number, as emendo log shows it.")]


def run(
    id: Number,
    model: opt.Model = opt.MODEL,
    ledger: keep.Where = None,
    by: keep.By = None,
    reason: keep.Note = "",
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Revert an edit."""
    from emendo.cli._loading import load_model

    keep.find_ledger(model, ledger).entry(id)  # before the model is loaded for nothing
    work = keep.open_workspace(load_model(model, dtype, device), ledger)
    step, found = work.revert(id, by=by, note=reason)
    later = work.ledger.later_upon(id)
    if as_json:
        emit(
            {
                "operation": as_values(step),
                "made_upon_it": [e.id for e in later],
                "examination": found.as_dict(),
            }
        )
        return
    console = output()
    console.print(f"[red]taken off[/red] edit {id}: {keep.wishes(work.ledger.entry(id))}", soft_wrap=True)
    lost = {holding.entry.id for holding in found.holdings if not holding.holds}
    if later:
        console.print(
            f"Made while it stood in the model: edits {', '.join(str(e.id) for e in later)}.", soft_wrap=True
        )
        broken = [entry for entry in later if entry.id in lost]
        for entry in broken:
            note(f"[yellow]no longer holds:[/yellow] edit {entry.id}: {keep.wishes(entry)}")
    elif found.holdings:
        console.print("No active edit was made while it stood in the model.")
    console.print(f"{keep.say_state(step)} {keep.summary(found)}", soft_wrap=True)
