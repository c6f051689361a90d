"""The edits that are in force in a model, kept so that nothing is lost: put on, taken off, tagged, and looked up.

:mod:`emendo.ledger.place` says where a model's ledger is.
"""

from __future__ import annotations

from emendo.ledger._schema import Check, Entry, NewEntry, Operation, State, Tag
from emendo.ledger.store import How, Ledger

__all__ = ["Check", "Entry", "How", "Ledger", "NewEntry", "Operation", "State", "Tag"]
