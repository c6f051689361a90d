"""The command line: one file for each command, and nothing that needs torch until a command runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from emendo.cli import _signals

if TYPE_CHECKING:
    from emendo.cli._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the program; the entry point of the script ``emendo``."""
    try:
        _signals.install()
        from emendo.cli._app import app

        app(prog_name="emendo")
    except KeyboardInterrupt:
        print("Stopped: nothing was written.", file=sys.stderr)
        sys.exit(_signals.STOPPED)
    finally:
        _signals.ignore()  # the interpreter is shutting down


def __getattr__(name: str) -> Any:  # so that the handlers are in place before typer is imported
    if name == "app":
        from emendo.cli._app import app

        return app
    raise AttributeError(f"module 'emendo.cli' has no attribute {name!r}")
