"""What commands say: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

WIDTH = 110
"""Of tables that no terminal limits."""


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """Ctrl-C, with what was saved and how to go on."""


def output() -> Console:
    """Where tables go; in a file they are as wide as they need to be read."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def messages() -> Console:
    """Where progress and notes go."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Say something on standard error."""
    messages().print(text, soft_wrap=True)


def complain(text: str, what: str = "Error:") -> None:
    """Say what went wrong on standard error."""
    messages().print(f"[red]{what}[/red] {escape(text)}", soft_wrap=True)


def emit(value: Any) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


class _Notes(logging.Handler):
    """Shows log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(escape(self.format(record)))


@contextmanager
def show_log() -> Iterator[None]:
    """Show the warnings that emendo logs inside the block."""
    handler = _Notes(logging.WARNING)
    logging.getLogger("emendo").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("emendo").removeHandler(handler)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line on standard error that turns while something takes its time."""
    with messages().status(escape(text)):
        yield
