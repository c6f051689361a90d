"""Printing: results on standard output, everything else on standard error.

Every text a command prints passes through the two consoles of this module (:mod:`emendo.cli._rich_console`). They are
imported when something is printed: the help needs none.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from emendo.cli._rich_console import Console
    from emendo.edits import BaseEdit

WIDTH = 110
"""Width of tables where no terminal limits it."""
_CONFLICTS = 5  # prompts in a warning


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """Ctrl-C, with a message that names what was saved and how to go on."""


def output() -> Console:
    """The console for results; where it is no terminal, tables are as wide as they need to be read."""
    from emendo.cli._rich_console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def messages() -> Console:
    """The console for progress, notes and errors."""
    from emendo.cli._rich_console import Console

    return Console(stderr=True)


_silent = False


def silence() -> None:
    """Print only errors from now on: another process reports for this one."""
    global _silent
    _silent = True


def note(text: str | Text) -> None:
    """Print a line on standard error."""
    if not _silent:
        messages().print(text, soft_wrap=True)


def complain(text: str, heading: str = "Error:") -> None:
    """Print what went wrong on standard error."""
    from rich.text import Text

    messages().print(Text.assemble((heading, "red"), f" {text}"), soft_wrap=True)


def warn_of_conflicts(edits: Iterable[BaseEdit]) -> None:
    """Warn, in one message, where edits that are combined change the answer to one prompt more than once."""
    from emendo.edits import conflicts

    if found := conflicts(edits):
        shown = [f"{p!r} to {', '.join(map(repr, t))}" for p, t in list(found.items())[:_CONFLICTS]]
        more = f" and {len(found) - _CONFLICTS} more" * (len(found) > _CONFLICTS)
        complain(
            f"{len(found)} prompt(s) edited more than once: {'; '.join(shown)}{more}. The changes add up, so that "
            "neither target may be the answer.",
            "Warning:",
        )


def emit(value: Any) -> None:
    """Print one JSON value on standard output.

    Numbers that JSON does not have (NaN and the infinities) become null. Characters that could control a terminal and
    those that the output's encoding lacks are written as JSON escapes, so that the value is the same for every reader.
    """
    from emendo._storage import finite_values
    from emendo.report.tables import CONTROLS

    plain = finite_values(value)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    text = CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(plain, indent=2, allow_nan=False)
    print(text, flush=True)


class _Notes(logging.Handler):
    """Prints log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


@contextmanager
def show_log() -> Iterator[None]:
    """Print the warnings that emendo logs inside the block."""
    handler = _Notes(logging.WARNING)
    logging.getLogger("emendo").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("emendo").removeHandler(handler)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a line with a spinner on standard error while the block runs."""
    from rich.text import Text

    with nullcontext() if _silent else messages().status(Text(text)):
        yield
