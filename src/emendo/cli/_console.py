"""What commands say: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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


class Work:
    """Bars of named pieces of work; an object of this class is what ``evaluate`` tells its progress."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` are done."""
        if what not in self._tasks:
            self._tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self._tasks[what], completed=done, total=total)


@contextmanager
def working() -> Iterator[Work]:
    """Bars on standard error, as long as the block runs."""
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages(), transient=True) as bars:
        yield Work(bars)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line on standard error that turns while something takes its time."""
    with messages().status(escape(text)):
        yield
