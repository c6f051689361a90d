"""Signals that stop a command: SIGTERM and a closed terminal do what Ctrl-C does, and none of them ends in a traceback.

Only the standard library is imported here: the handlers are in place before anything else is loaded.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

STOPPED = 130
"""The exit code of a command that was stopped."""

asked = False
"""Whether a signal has asked this command to stop."""

_RETRY = 0.05
"""Seconds until a signal that arrived during an import is looked at again."""


def install() -> None:
    """Install the handlers; signals that the caller of this process ignores stay ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)


def ignore() -> None:
    """Ignore all of them, once there is nothing left to stop."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but never inside an import.

    Extension modules turn an exception during their own initialisation into other errors, or abort the process.
    """
    global asked
    asked = True
    if _importing(frame):
        timer = threading.Timer(_RETRY, signal.raise_signal, [signal.SIGINT])
        timer.daemon = True
        timer.start()
    else:
        raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    """Do whatever Ctrl-C does at this moment, such as saving the state of a training run."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
