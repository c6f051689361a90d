"""The command line's fixtures, for the reproduction's own command."""

from cli.conftest import any_processor, emendo_command, model

__all__ = ["any_processor", "emendo_command", "model"]
