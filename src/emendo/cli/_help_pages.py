"""The help pages of all commands as one Markdown page: ``python -m emendo.cli._help_pages > docs/cli.md``."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import typer

from emendo.cli._app import COMMANDS, build

WIDTH = 100


def page() -> str:
    """Return the page as Markdown."""
    command = typer.main.get_command(build())
    parts = [
        "# The command line",
        "The output of `--help` for every command, written by `python -m emendo.cli._help_pages > docs/cli.md`.",
        (
            "Exit codes: 0 done, 2 an error, 130 stopped by Ctrl-C, SIGTERM or a closed terminal. "
            "`emendo --debug COMMAND ...` prints a traceback with the error."
        ),
    ]
    for name in ([], *([name] for name in COMMANDS)):
        with redirect_stdout(io.StringIO()) as shown:
            words = " ".join(name).split()
            command.main([*words, "--help"], prog_name="emendo", standalone_mode=False, terminal_width=WIDTH)
        parts += [f"## {' '.join(['emendo', *name])}", f"```text\n{shown.getvalue().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    typer.echo(page(), nl=False)
