"""Ctrl-C in a loop of steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(tell: Callable[[str], None]) -> Iterator[Any]:
    """Ctrl-C asks the loop to stop after its step; a second one stops at once. Elsewhere signals stay as they are."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        tell("Stopping after this step. Ctrl-C again stops at once; then only the last checkpoint is kept.")

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread
        yield lambda: asked
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
