"""The ledger of a model: the edits that are active in it, applied and taken off step by step, with nothing lost.

:mod:`emendo.ledger.place` finds the ledger of a model; :mod:`emendo.ledger.workspace` joins the two.
"""

from __future__ import annotations

from emendo.ledger._schema import Check, Entry, NewEntry, Operation, State, Tag
from emendo.ledger.store import Ledger, StepOptions

__all__ = ["Check", "Entry", "Ledger", "NewEntry", "Operation", "State", "StepOptions", "Tag"]
