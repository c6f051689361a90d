"""`emendo diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli.apply import as_values

HELP = """Show which edits differ between two states of a model: steps by their numbers, tags, or head.

\b
Example:
  emendo diff release-1 head --model ./my-model
"""

First = Annotated[str, typer.Argument(metavar="A", help="A step's number, a tag, or head.")]
Second = Annotated[str, typer.Argument(metavar="B", help="Another.")]


def run(
    first: First,
    second: Second = "head",
    model: opt.Model = opt.MODEL,
    ledger: keep.Where = None,
    as_json: opt.AsJson = False,
) -> None:
    """Compare two states."""
    book = keep.find_ledger(model, ledger)
    added, removed = book.diff(keep.state_of(first), keep.state_of(second))
    if as_json:
        emit({"added": [as_values(e) for e in added], "removed": [as_values(e) for e in removed]})
        return
    console = output()
    for entry in removed:
        console.print(f"[red]- edit {entry.id}[/red]  {keep.wishes(entry)}", soft_wrap=True)
    for entry in added:
        console.print(f"[green]+ edit {entry.id}[/green]  {keep.wishes(entry)}", soft_wrap=True)
    if not added and not removed:
        console.print("The same edits are active in both.")
