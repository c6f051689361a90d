"""Programs of one command, with the options and help of emendo's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from emendo.cli._app import Command, Group


def program_of(run: Callable[..., None], text: str, *, no_args_is_help: bool = False) -> Any:
    """A program that runs a function.

    Args:
        run: the function; its parameters are the options.
        text: of the help.
        no_args_is_help: show the help where no option is given.
    """
    app = typer.Typer(
        cls=Group,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.command(cls=Command, help=text, no_args_is_help=no_args_is_help)(run)
    return typer.main.get_command(app)
