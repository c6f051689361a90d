"""A memory of edits: each stays by itself, and the prompt decides which one is in force."""

from emendo.memory.bank import FALSE_FIRES, Choice, EditMemory
from emendo.memory.router import Router

__all__ = ["FALSE_FIRES", "Choice", "EditMemory", "Router"]
