"""The ledger of a model: the edits that are active in it, applied and taken off step by step, with nothing lost.

:class:`Workspace` joins a model and its ledger; :mod:`emendo.ledger.place` finds the ledger of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emendo.ledger._schema import Check, Entry, NewEntry, Operation, State, Tag
from emendo.ledger.store import Ledger, StepOptions

if TYPE_CHECKING:
    from emendo.ledger.health import RefusedError
    from emendo.ledger.workspace import Workspace

__all__ = [
    "Check",
    "Entry",
    "Ledger",
    "NewEntry",
    "Operation",
    "RefusedError",
    "State",
    "StepOptions",
    "Tag",
    "Workspace",
]


def __getattr__(name: str) -> Any:  # so that looking into a ledger does not need torch
    if name == "Workspace":
        from emendo.ledger.workspace import Workspace

        return Workspace
    if name == "RefusedError":
        from emendo.ledger.health import RefusedError

        return RefusedError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
