"""`emendo evaluate compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import emit

HELP = """Put two evaluations of the same facts side by side.

Takes two folders that emendo evaluate --out wrote and prints, for each score that both have, the two means, their
paired difference over the facts with its 95% interval, and its p value (a sign-flip permutation test).

\b
Example:
  emendo evaluate compare runs/first-measured runs/second-measured
"""

First = Annotated[Path, typer.Argument(metavar="A", help="The folder of an evaluation.")]
Second = Annotated[Path, typer.Argument(metavar="B", help="The folder of another one.")]


def run(first: First, second: Second, as_json: opt.AsJson = False) -> None:
    """Compare two evaluations."""
    from emendo.cli._tables import print_table
    from emendo.evaluate.inspect import side_by_side
    from emendo.evaluate.run_folder import RunFolder
    from emendo.report import figures

    lines = side_by_side(*(RunFolder.open(folder).evaluation() for folder in (first, second)))
    if as_json:
        emit([asdict(line) for line in lines])
    else:
        print_table(figures.comparison(lines, str(first), str(second)))
