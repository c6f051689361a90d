"""A model with its ledger: base weights and the active edits beside them, and the steps from one state to the next.

::

    work = Workspace.open(emendo.load("my-model"))
    work.apply(edit)                    # checked by the guard first
    with work.applied() as lm:
        lm.generate("The capital of Australia is")
    work.undo()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from emendo.editors import Editor
from emendo.edits.edit import BaseEdit, Edit, Request
from emendo.errors import ConflictError, RequestError, StorageError
from emendo.ledger._database import Where
from emendo.ledger._schema import NewEntry, Operation, State
from emendo.ledger._stack import Stack
from emendo.ledger.guard import Examination, Guard, Health, Limits, RefusedError
from emendo.ledger.place import create_ledger, find_ledger, open_ledger
from emendo.ledger.store import Ledger
from emendo.ledger.watch import Watched
from emendo.models.lm import LM

_ATTEMPTS = 10  # at a step while other processes take theirs


class Workspace:
    """A model and its ledger.

    Args:
        lm: the base model; its weights are never changed.
        ledger: which edits are active.
        limits: the guard's.
        watched: what the guard watches.
        recheck_every: the whole stack is measured again whenever so many more edits are active; 0 for never.
    """

    def __init__(
        self,
        lm: LM,
        ledger: Ledger,
        *,
        limits: Limits | None = None,
        watched: Watched | None = None,
        recheck_every: int = 10,
    ) -> None:
        self.lm, self.ledger = lm, ledger
        self.limits, self.recheck_every = limits or Limits(), recheck_every
        self._stack = Stack(lm, ledger)
        self._watched = watched or Watched()

    @cached_property
    def _guard(self) -> Guard:  # made when it is needed: generating needs none
        return Guard(self._stack, self._watched)

    @classmethod
    def open(cls, lm: LM, where: Where | None = None, *, create: bool = True, **settings: Any) -> Workspace:
        """A model with its ledger, which is begun if there is none.

        Args:
            lm: the model.
            where: the ledger's folder or SQLAlchemy URL; by default the model's own place
                (:func:`emendo.ledger.place.ledger_of`).
            create: begin a ledger where there is none.
            settings: further arguments of the workspace.

        Raises:
            MismatchError: the ledger is another model's.
            StorageError: it is damaged, from a newer emendo, missing and not to be made, or a second one of this model.
        """
        return cls(lm, _ledger(lm, where, create), **settings)

    # ------------------------------------------------------------------------------------------ the working model

    def edit(self, id: int) -> Edit:
        """An edit of the ledger, active or not.

        Raises:
            RequestError: there is none of that number.
            StorageError: it is damaged.
        """
        return self._stack.edit(id)

    def composed(self, state: State = "head") -> Edit | None:
        """The active edits as one; None where there is none."""
        return self._stack.composed(self.ledger.operation(state).active)

    def applied(self, state: State = "head") -> AbstractContextManager[LM]:
        """The working model for the length of a ``with`` block: the base with all active edits.

        Args:
            state: an earlier operation, or a tag, instead of the present state.
        """
        return self._stack.under(self.ledger.operation(state).active)

    def make(self, editor: Editor, requests: Sequence[Request]) -> Edit:
        """An edit that an editor makes upon the working model, and that knows so; it is not applied yet.

        Raises:
            RequestError: the editor's edits change no weights, or a request does not fit the model.
        """
        if editor.host(self.lm) is not self.lm:
            raise RequestError(f"{editor.name} edits a model that it trained itself, not {self.lm.name}.")
        head = self.ledger.head
        with self._stack.under(head.active):
            edit = _of_weights(editor.edit(self.lm, requests))
        return self.upon(edit, head)

    def upon(self, edit: Edit, operation: Operation) -> Edit:
        """The same edit, which knows that it was made upon the edits that were active after an operation."""
        digests = tuple(entry.digest for entry in self.ledger.entries(operation.active))
        return replace(edit, origin=replace(edit.origin, upon=digests))

    # ------------------------------------------------------------------------------------------ steps

    def check(self, edit: BaseEdit, paraphrases: Sequence[str] = ()) -> Health:
        """The guard's figures of an edit on top of the active ones; nothing is applied.

        Args:
            edit: the edit.
            paraphrases: rewordings of its one request.

        Raises:
            MismatchError: it was made for another model.
            RequestError: it changes no weights, or rewordings for an edit of several requests.
        """
        return self._guard.health(self.ledger.head.active, _of_weights(edit), paraphrases)

    def apply(
        self,
        edit: BaseEdit,
        *,
        paraphrases: Sequence[str] = (),
        force: bool = False,
        by: str | None = None,
        note: str = "",
    ) -> Operation:
        """Check an edit and put it on top of the active ones.

        Args:
            edit: the edit.
            paraphrases: rewordings of its one request, for the guard.
            force: apply it even if the guard refuses it; the ledger says so.
            by: who does it; by default the user of this process.
            note: why.

        Raises:
            RefusedError: the guard refuses it; nothing was applied.
            RequestError: it is active already, or changes no weights.
            MismatchError: it was made for another model.
            ConflictError: other processes changed the ledger time and again while it was being checked.
        """
        change = _of_weights(edit)
        for _ in range(_ATTEMPTS):
            head = self.ledger.head
            health = self._guard.health(head.active, change, paraphrases)
            problems = health.problems(self.limits)
            if problems and not force:
                raise RefusedError(health, problems)
            figures = {**health.as_dict(), "limits": asdict(self.limits), "problems": problems}
            try:
                done = self.ledger.apply(
                    change.to_bytes(),
                    _about(change),
                    parent=head.id,
                    health=figures,
                    forced=bool(problems),
                    by=by,
                    note=note,
                )
            except ConflictError:
                continue  # checked upon a state that is no longer the latest
            if self.recheck_every and len(done.active) % self.recheck_every == 0:
                self.examine(keep=True)
            return done
        raise ConflictError(
            f"The ledger changed {_ATTEMPTS} times while the edit was being checked; try again."
        )

    def undo(self, n: int = 1, *, by: str | None = None, note: str = "") -> Operation:
        """Take the last ``n`` active edits off, exactly; see :meth:`emendo.ledger.store.Ledger.undo`."""
        return self.ledger.undo(n, by=by, note=note)

    def revert(self, id: int, *, by: str | None = None, note: str = "") -> tuple[Operation, Examination]:
        """Take one edit off, wherever it stands, and measure those that stay.

        The weights are exactly those of the base with the other edits. Edits that were made while this one stood in the
        model (:meth:`~emendo.ledger.store.Ledger.later_upon`) may have relied on it; the measurement says what holds.

        Raises:
            RequestError: it is not active.
        """
        done = self.ledger.revert(id, by=by, note=note)
        return done, self.examine(keep=True)

    def examine(self, *, keep: bool = False) -> Examination:
        """Ask every active edit again, and everything that is watched.

        Args:
            keep: write the figures into the ledger.
        """
        found = self._guard.examine(self.ledger.head)
        if keep:
            self.ledger.add_check(found.as_dict(), operation=found.operation)
        return found


def _of_weights(edit: BaseEdit) -> Edit:
    if not isinstance(edit, Edit):
        raise RequestError(
            f"A ledger keeps changes of weights; an edit of the kind {edit.kind!r} changes none. Apply it where the "
            "model is asked: with edit.applied(lm)."
        )
    return edit


def _about(edit: Edit) -> NewEntry:
    return NewEntry(
        editor=edit.origin.editor,
        version=edit.origin.version,
        requests=tuple(asdict(request) for request in edit.origin.requests),
        made=edit.origin.date,
        upon=edit.origin.upon,
        rank=edit.rank,
        card=edit.card,
    )


def _ledger(lm: LM, where: Where | None, create: bool) -> Ledger:
    if not create or (where is None and find_ledger(lm.name) is not None):
        return open_ledger(lm.name, lm.fingerprint, where)
    try:
        return create_ledger(lm.name, lm.fingerprint, where)
    except StorageError as failed:
        try:  # another process has begun it, or it was begun elsewhere and is named for the first time here
            return open_ledger(lm.name, lm.fingerprint, where)
        except StorageError:
            raise failed from None
