"""Ctrl-C and SIGTERM during a loop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_LOG = logging.getLogger("emendo.train")


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM stop a loop after its present step; a second signal stops it at once.

    Outside the main thread signals keep their handlers.

    Yields:
        Whether a signal has arrived.
    """
    arrived = False

    def handle(number: int, frame: object) -> None:
        nonlocal arrived
        if arrived:
            raise KeyboardInterrupt
        arrived = True
        _LOG.warning(
            "Stopping after this step. Ctrl-C again stops at once; then only the last checkpoint is kept."
        )

    handlers: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread
                handlers[number] = signal.signal(number, handle)
        yield lambda: arrived
    finally:
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
