"""The start of the command line, as ratios to what it cannot avoid.

`emendo --help` against Python with typer; `emendo edit` against importing torch and transformers, and against
that and loading the model. Whole processes, interleaved.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from _common import Spread, interleaved, machine, parser, ratio, table

EDIT = ("edit", "The capital of Australia is", "Canberra", "--json", "--model")
HELP, TYPER = "emendo --help", "python and typer"
FIRST, IMPORTS, LOADED = "emendo edit", "import torch, transformers", "the same, and emendo.load"


def process(*arguments: str, threads: int) -> Callable[[], object]:
    """A Python process with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return lambda: subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env=environment
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=5).parse_args(argv)
    model, threads = options.model, options.threads
    imports = "import torch, transformers"
    cases = {
        TYPER: process("-c", "import typer; typer.Typer()", threads=threads),
        HELP: process("-m", "emendo", "--help", threads=threads),
        IMPORTS: process("-c", imports, threads=threads),
        LOADED: process("-c", f"{imports}, emendo; emendo.load({model!r})", threads=threads),
        FIRST: process("-m", "emendo", *EDIT, model, threads=threads),
    }
    times = interleaved(cases, options)
    machine(options)
    table(
        "Start of the command line, seconds of a whole process",
        ("process", "seconds", "ratio", "to"),
        [
            (HELP, Spread.of(times[HELP]), ratio(times[HELP], times[TYPER]), TYPER),
            (FIRST, Spread.of(times[FIRST]), ratio(times[FIRST], times[IMPORTS]), IMPORTS),
            (FIRST, Spread.of(times[FIRST]), ratio(times[FIRST], times[LOADED]), LOADED),
        ],
    )


if __name__ == "__main__":
    main()
