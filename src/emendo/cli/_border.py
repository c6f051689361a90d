"""The border of the program: every way a command can end becomes an exit code and at most one message.

Exit codes: 0 done, 2 an error, 130 stopped by Ctrl-C, SIGTERM or a closed terminal. There are no others, and a
traceback is printed only with ``--debug``.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer

from emendo.cli import _signals
from emendo.cli._console import Interrupted, complain, messages, show_log
from emendo.cli._signals import STOPPED
from emendo.errors import EmendoError

DONE, FAILED = 0, 2

_ClickException = typer.BadParameter.__mro__[2]
"""The base of all usage errors; typer carries click inside itself since 0.16, under a private name."""

_REASONS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Permission denied",
    errno.EROFS: "The file system is read-only",
    errno.ENAMETOOLONG: "The name is too long",
    errno.ELOOP: "Symbolic links lead in a circle",
    errno.EISDIR: "This is a folder, not a file",
    errno.ENOTDIR: "A part of this path is a file, not a folder",
    errno.ENOENT: "There is no such file",
    errno.EMFILE: "Too many files are open",
    errno.EIO: "The device cannot be read or written",
}


def run(command: Callable[[], Any], *, debug: bool = False) -> int:
    """Run a command and report how it ended.

    Args:
        command: the command with its arguments.
        debug: print a traceback of any error.

    Returns:
        The exit code.
    """
    _prepare_streams()
    _signals.asked = False
    try:
        with _own_warnings(), show_log():
            command()
        _flush(sys.stdout)
    except BaseException as error:  # noqa: BLE001 - nothing may pass
        if _signals.asked and _may_be_the_signal(error):
            error = KeyboardInterrupt()
        with suppress(OSError, ValueError):  # standard error may be closed
            return _report(error, debug)
        return FAILED
    finally:
        for stream in (sys.stdout, sys.stderr):
            _silence_if_broken(stream)
    return DONE


def _may_be_the_signal(error: BaseException) -> bool:
    """Whether a signal may have caused an error: libraries turn it into errors of their own, also while they load.

    An error of emendo has another cause where it names none, or one of the system, such as a full disk.
    """
    if isinstance(error, EmendoError):
        return not isinstance(error.__cause__, OSError | EmendoError | None)
    return not isinstance(error, Interrupted | typer.Exit | SystemExit)


def _report(error: BaseException, debug: bool) -> int:
    """Print what happened and give the exit code."""
    if isinstance(error, typer.Exit):
        return DONE if error.exit_code == 0 else FAILED
    if isinstance(error, SystemExit):
        return DONE if not error.code else FAILED
    from rich.text import Text

    if isinstance(error, Interrupted):
        complain(str(error), "Stopped:")
        return STOPPED
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        complain("nothing was written.", "Stopped:")
        return STOPPED
    if isinstance(error, BrokenPipeError):
        return DONE  # the reader of the pipe has seen enough
    if isinstance(error, _ClickException):
        usage = io.StringIO()
        error.show(file=usage)  # type: ignore[attr-defined]
        messages().print(Text(usage.getvalue().rstrip()), soft_wrap=True)
        return FAILED
    if debug:
        messages().print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
    complain(explain(error))
    return FAILED


def explain(error: BaseException) -> str:
    """Give the message for an error: its cause in plain words, and what can be done."""
    if isinstance(error, EmendoError):
        text = str(error)
        full = _disk_is_full(error)
        return f"{full}. {text}" if full and full.lower() not in text.lower() else text
    if full := _disk_is_full(error):
        name = getattr(error, "filename", None)
        return f"{full}: {name or 'the output'} could not be written completely."
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        hint = "A smaller --batch, another --dtype or another --device may fit."
        return f"There is not enough memory. {_first_line(error)} {hint}"
    if isinstance(error, OSError):
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        return f"{reason}: {error.filename}." if error.filename is not None else f"{reason}."
    if isinstance(error, RecursionError):
        return "A file or an option is nested too deeply to be read."
    if isinstance(error, TypeError) and "TextEncodeInput" in str(error):  # a tokenizer
        return (
            "A text contains bytes that are not UTF-8, or half of a surrogate pair. Where the locale is not UTF-8, set "
            "PYTHONUTF8=1."
        )
    if isinstance(error, UnicodeEncodeError):
        return (
            f"A text or a file name cannot be written in the encoding {error.encoding}. Set PYTHONUTF8=1, or a UTF-8 "
            "locale such as LC_ALL=C.UTF-8."
        )
    if isinstance(error, UnicodeError):
        return f"A file is not UTF-8 text. ({error})"
    if isinstance(error, OverflowError):
        return f"A number is too large. ({_first_line(error)})"
    if isinstance(error, ValueError) and "null" in str(error) and "embedded" in str(error):
        return "A text or a file name contains a NUL character, which is not possible here."
    if isinstance(error, ModuleNotFoundError):
        return f"The Python package {error.name} is not installed; install it with pip."
    library = type(error).__module__.partition(".")[0]
    if library in ("sqlalchemy", "sqlite3", "psycopg"):
        return f"The database of the ledger refused. ({_first_line(error)})"
    if library in ("safetensors", "safetensors_rust", "builtins") and "Safetensor" in type(error).__name__:
        return f"A file of weights is damaged. ({_first_line(error)})"
    return (
        f"This is a fault in emendo: {type(error).__name__}: {_first_line(error)} Please report it with the output of "
        "the same command with --debug: emendo --debug COMMAND ..."
    )


def _disk_is_full(error: BaseException | None) -> str | None:
    """The reason, where a full disk is among the causes of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _REASONS[error.errno]
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            return _REASONS[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory; on a processor it raises a plain RuntimeError."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if not line or line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Print emendo's own warnings as one line, each once; those of libraries stay as they are."""
    with warnings.catch_warnings():
        show_warning, seen = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not category.__module__.startswith("emendo"):
                show_warning(message, category, *rest, **more)
            elif str(message) not in seen:
                complain(str(message), "Warning:")
            seen.add(str(message))

        warnings.showwarning = show
        yield


def _prepare_streams() -> None:
    """Make standard streams safe to use: none is closed, and no character is too strange to be written."""
    for number in (0, 1, 2):  # a file opened later must not take the number of a standard stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush(stream: TextIO | None) -> None:
    if stream is not None:
        stream.flush()


def _silence_if_broken(stream: TextIO | None) -> None:
    """Discard output that a full disk or a closed pipe refused, so that the interpreter exits quietly."""
    try:
        _flush(stream)
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
