"""Progress of long work: one interface for training, evaluation and every command.

A function that takes long accepts ``progress: Progress``. The default, :class:`Silent`, shows nothing;
``Lines(logging.getLogger("emendo").info)`` logs a line every few seconds; the command line shows bars.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives how far a piece of work has come."""

    def update(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """``done`` of the ``total`` units of a task are finished.

        Args:
            task: its name, such as ``"training"``; several tasks may be under way at the same time.
            done: finished units; a task that starts again counts from 0.
            total: all units.
            figures: running figures by name, such as the loss.
        """

    def report(self, heading: str, figures: Mapping[str, float], remark: str = "") -> None:
        """Show figures that must stay visible, such as those of a validation."""


class Silent:
    """Shows nothing; the base class for progress displays that need only one of the methods."""

    def update(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """Do nothing."""

    def report(self, heading: str, figures: Mapping[str, float], remark: str = "") -> None:
        """Do nothing."""


SILENT = Silent()
"""The default of every ``progress`` argument."""


class Lines:
    """Writes a line every few seconds, for log files and wherever nothing can be redrawn.

    Args:
        write: receives each line, such as ``logging.getLogger("emendo").info`` or ``print``.
        every: seconds between two lines; reports are always written.
    """

    def __init__(self, write: Callable[[str], object], every: float = 5.0) -> None:
        self.write, self.every = write, every
        self._last = time.monotonic()

    def update(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """Write a line, unless one was written a moment ago."""
        if time.monotonic() - self._last >= self.every:
            self.report(f"{task} {done}/{total}", figures or {})

    def report(self, heading: str, figures: Mapping[str, float], remark: str = "") -> None:
        """Write a line."""
        self._last = time.monotonic()
        self.write(
            "  ".join([heading, *(f"{k} {format_figure(k, v)}" for k, v in figures.items()), remark]).rstrip()
        )


def format_figure(name: str, value: float) -> str:
    """A figure as text: shares as percentages, ``"time left"`` as minutes and seconds, other numbers in short."""
    if name == "time left":
        minutes, seconds = divmod(int(value), 60)
        return f"{minutes}:{seconds:02d}"
    if name in ("success", "generalisation", "locality"):
        return f"{value:.1%}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
