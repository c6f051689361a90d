"""`emendo diff`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output

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
    ledger: shared.Where = None,
    as_json: opt.AsJson = False,
) -> None:
    """Compare two states."""
    book = shared.find_ledger(model, ledger)
    added, removed = book.diff(shared.state_of(first), shared.state_of(second))
    if as_json:
        emit({"added": [e.as_dict() for e in added], "removed": [e.as_dict() for e in removed]})
        return
    console = output()
    for entry in removed:
        line = Text.assemble((f"- edit {entry.id}", "red"), "  ", shared.requests_line(entry))
        console.print(line, soft_wrap=True)
    for entry in added:
        line = Text.assemble((f"+ edit {entry.id}", "green"), "  ", shared.requests_line(entry))
        console.print(line, soft_wrap=True)
    if not added and not removed:
        console.print("The same edits are active in both.")
