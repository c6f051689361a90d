"""The command line: one file for each command, and nothing that needs torch until a command runs."""

from emendo.cli._app import app, main

__all__ = ["app", "main"]
