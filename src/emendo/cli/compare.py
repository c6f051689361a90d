"""`emendo compare`, the former name of ``python -m reproduction.mend_paper``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import typer

import emendo
from emendo.cli._console import complain
from emendo.errors import RequestError

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def run(ctx: typer.Context) -> None:
    """Pass the arguments on to the reproduction of the MEND paper, which is part of a checkout only."""
    root = Path(emendo.__file__).parents[2]
    if not (root / "reproduction" / "mend_paper").is_dir():
        raise RequestError(
            "The tables of the MEND paper are made by emendo's source repository, not by the package: clone it and run "
            "python -m reproduction.mend_paper there."
        )
    complain("emendo compare is now python -m reproduction.mend_paper.", "Warning:")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    import_module("reproduction.mend_paper.__main__").program(ctx.args, standalone_mode=False)
