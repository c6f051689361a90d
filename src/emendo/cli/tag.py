"""`emendo tag`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output

HELP = """Name the present state of a model, or list the names.

\b
Examples:
  emendo tag release-1 --model ./my-model
  emendo tag --list --model ./my-model
"""

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="The name; left out with --list.")]
At = Annotated[
    int | None, typer.Option("--at", metavar="STEP", help="Name an earlier step.  [default: the latest]")
]
Listed = Annotated[bool, typer.Option("--list", help="List the names.")]


def run(
    name: Name = None,
    at: At = None,
    listed: Listed = False,
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    by: shared.By = None,
    as_json: opt.AsJson = False,
) -> None:
    """Name a state."""
    from emendo.errors import RequestError

    if (name is None) != listed:
        raise RequestError("Give a name for the present state, or --list.")
    book = shared.find_ledger(model, ledger)
    tags = book.tags() if name is None else [book.tag(name, at, by=by)]
    if as_json:
        emit([tag.as_dict() for tag in tags])
        return
    for tag in tags:
        active = book.operation(tag.operation).active_count
        about = f"step {tag.operation}, {active} active, by {tag.by}, {tag.at[:10]}"
        output().print(Text.assemble((tag.name, "bold"), f"  {about}"))
    if not tags:
        note("There are no tags yet.")
