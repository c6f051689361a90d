"""A base model under any of its ledger's edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from emendo.edits.edit import Edit, compose
from emendo.ledger.store import Ledger
from emendo.models.lm import LM


class Stack:
    """The base, and the edits of the ledger, each read once.

    Attributes:
        lm: the base; its weights are never changed.
        ledger: where the edits are.
    """

    def __init__(self, lm: LM, ledger: Ledger) -> None:
        self.lm, self.ledger = lm, ledger
        self._edits: dict[int, Edit] = {}

    def edit(self, id: int) -> Edit:
        """An edit of the ledger, active or not.

        Raises:
            RequestError: there is none of that number.
            StorageError: it is damaged.
        """
        if id not in self._edits:
            self._edits[id] = Edit.from_bytes(self.ledger.load(id))
        return self._edits[id]

    def composed(self, ids: Sequence[int]) -> Edit | None:
        """Some edits as one; None where there is none."""
        return compose([self.edit(id) for id in ids]) if ids else None

    @contextmanager
    def under(self, ids: Sequence[int], *more: Edit) -> Iterator[LM]:
        """The model with some of the ledger's edits, and others, for the length of a ``with`` block."""
        edits = [*(self.edit(id) for id in ids), *more]
        if not edits:
            yield self.lm
            return
        with compose(edits).applied(self.lm):
            yield self.lm
