"""A model with its ledger: the base weights with the active edits attached, and the steps from state to state.

::

    work = Workspace.open(emendo.load("my-model"))
    work.apply(edit)                    # the guard checks it first
    with work.applied() as lm:
        lm.generate("The capital of Australia is")
    work.undo()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from emendo.editors import Editor
from emendo.edits.edit import BaseEdit, Edit, Request, as_weights
from emendo.errors import RequestError, StorageError
from emendo.ledger._composition import Candidate, EditStack
from emendo.ledger._database import Where
from emendo.ledger._schema import Entry, NewEntry, Operation, State
from emendo.ledger.guard import Examination, Guard
from emendo.ledger.health import Health, Limits, RefusedError
from emendo.ledger.place import create_ledger, find_ledger, open_ledger
from emendo.ledger.probes import Probes
from emendo.ledger.store import Ledger, StepOptions
from emendo.low_rank import applied
from emendo.memory.bank import EditMemory
from emendo.models.lm import LM

_LISTED = 64  # edits that the provenance of another edit lists one by one


class Workspace:
    """A model and its ledger.

    Args:
        lm: the base model; its weights are never changed.
        ledger: the ledger of its active edits.
        limits: the limits of the guard.
        probes: the probes of the guard.
        recheck_every: all active edits are measured again when their number reaches a multiple of this; from ten times
            this number on, a multiple of ten times this, and so on, so that the cost for each edit stays the same. 0
            for never.
    """

    def __init__(
        self,
        lm: LM,
        ledger: Ledger,
        *,
        limits: Limits | None = None,
        probes: Probes | None = None,
        recheck_every: int = 10,
    ) -> None:
        self.lm, self.ledger = lm, ledger
        self.limits, self.recheck_every = limits or Limits(), recheck_every
        self._stack = EditStack(lm, ledger)
        self._probes = probes or Probes()

    @cached_property
    def _guard(self) -> Guard:  # on first use: generating does not need it
        return Guard(self._stack, self._probes)

    @classmethod
    def open(cls, lm: LM, where: Where | None = None, *, create: bool = True, **settings: Any) -> Workspace:
        """Open the ledger of a model.

        Args:
            lm: the model.
            where: the ledger's folder or SQLAlchemy URL; by default the model's own place
                (:func:`emendo.ledger.place.default_folder`).
            create: create a ledger if there is none.
            settings: further arguments of the workspace.

        Raises:
            MismatchError: the ledger belongs to another model.
            StorageError: it is damaged, from a newer emendo, missing (with ``create=False``), or a second one of the
                model.
        """
        return cls(lm, _ledger(lm, where, create), **settings)

    # ------------------------------------------------------------------------------------------ the working model

    def edit(self, id: int) -> Edit:
        """An edit of the ledger, active or not.

        Raises:
            RequestError: the ledger has no edit of that number.
            StorageError: it is damaged.
        """
        return self._stack.edit(id)

    def composed(self, state: State = "head") -> Edit | None:
        """The active edits that are in the weights, as one; None if there are none."""
        return self._stack.composed(self._stack.in_weights(self.ledger.operation(state)))

    def memory(self, state: State = "head") -> EditMemory:
        """The memory of the active edits that are not in the weights.

        ``work.memory().why(prompt)`` says which edit answers a prompt.
        """
        return self._stack.memory(self.ledger.operation(state))

    def applied(self, state: State = "head") -> AbstractContextManager[LM]:
        """The working model for the length of a ``with`` block: the base model with all active edits.

        The edits in the weights change every answer of the model; of those in the memory each prompt has the one in
        whose scope it is, in the model that the block receives.

        Args:
            state: an earlier operation or a tag, instead of the latest state.
        """
        return self._stack.applied(self.ledger.operation(state))

    def tried(self, edit: BaseEdit, scope: Mapping[str, Any]) -> AbstractContextManager[LM]:
        """The working model with one more edit in its memory, for the length of a ``with`` block; nothing is applied.

        Args:
            edit: the edit.
            scope: as in :meth:`apply`.
        """
        return self._stack.applied(self.ledger.head, Candidate(_of_weights(edit), scope))

    @contextmanager
    def in_weights(self, operation: Operation) -> Iterator[LM]:
        """The base model with the edits that are in the weights after an operation, for the length of a block."""
        with applied(self.lm.model, self._stack.changes(operation)):
            yield self.lm

    def make(self, editor: Editor, requests: Sequence[Request]) -> Edit:
        """Make an edit with the edits in the weights attached, without applying it; it records that they were active.

        Raises:
            RequestError: the editor's edits change no weights, or a request does not fit the model.
        """
        if why := editor.no_changes_of(self.lm):
            raise RequestError(f"A ledger stores changes of weights; {why}.")
        head = self.ledger.head
        with self.in_weights(head):
            edit = _of_weights(editor.edit(self.lm, requests))
        return self.upon(edit, head)

    def upon(self, edit: Edit, operation: Operation) -> Edit:
        """The same edit with the record that it was made with the edits that were in the weights after an operation.

        A short list is recorded as digests, a long one as a reference to the state of this ledger.
        """
        ids = self._stack.in_weights(operation)
        upon = [f"{self.ledger.id}@{operation.id}"] if len(ids) > _LISTED else self.ledger.digests(ids)
        return replace(edit, origin=replace(edit.origin, upon=tuple(upon)))

    # ------------------------------------------------------------------------------------------ steps

    def prepare(self) -> None:
        """Take the guard's measurements of the state as it is, so that the next edit need not wait for them."""
        self._guard.prepare(self.ledger.head)

    def check(
        self, edit: BaseEdit, paraphrases: Sequence[str] = (), scope: Mapping[str, Any] | None = None
    ) -> Health:
        """The guard's figures of an edit on top of the active ones; nothing is applied.

        Args:
            edit: the edit.
            paraphrases: paraphrases of its one request.
            scope: as in :meth:`apply`.

        Raises:
            MismatchError: it was made for another model.
            RequestError: it changes no weights, or there are paraphrases for an edit of several requests.
        """
        return self._guard.health(self.ledger.head, _of_weights(edit), paraphrases, scope)

    def same_prompts(self, edit: BaseEdit, state: State = "head") -> tuple[Entry, ...]:
        """The active edits that have a prompt in common with an edit: one fact edited twice.

        Args:
            edit: the edit.
            state: an earlier operation or a tag, instead of the latest state.
        """
        return self.ledger.with_same_prompts(tuple(r.as_dict() for r in edit.origin.requests), state)

    def apply(
        self,
        edit: BaseEdit,
        *,
        paraphrases: Sequence[str] = (),
        scope: Mapping[str, Any] | None = None,
        force: bool = False,
        by: str | None = None,
        note: str = "",
    ) -> Operation:
        """Check an edit and activate it after the active ones.

        If other processes change the ledger during the check it is repeated, at last while they wait.

        Args:
            edit: the edit.
            paraphrases: paraphrases of its one request, for the guard.
            scope: puts the edit into the memory instead of the weights: only the prompts that ask for it are answered
                with it. ``{}`` leaves the judgement to the router; ``subject``, ``paraphrases`` and ``aliases`` (see
                :meth:`emendo.memory.EditMemory.add`) tell it more.
            force: apply it even if the guard refuses it; the ledger records that.
            by: name of the user; by default the user of this process.
            note: a comment.

        Raises:
            RefusedError: the guard refuses it; nothing was applied.
            RequestError: it is active already, or changes no weights.
            MismatchError: it was made for another model.
        """
        change = _of_weights(edit)

        def check(head: Operation) -> StepOptions:
            health = self._guard.health(head, change, paraphrases, scope)
            problems = health.problems(self.limits)
            if problems and not force:
                raise RefusedError(health, problems)
            figures = {**health.as_dict(), "limits": self.limits.as_dict(), "problems": problems}
            if scope is not None:
                figures["captured"] = self._guard.captured(head, change, scope)
            return {"health": figures, "forced": bool(problems)}

        step = self.ledger.apply_checked(
            change.to_bytes(), _description(change), check, scope, by=by, note=note
        )
        if self._is_due(step.active_count):
            self.examine(keep=True)
        return step

    def _is_due(self, active: int) -> bool:
        """Whether all edits are to be measured again."""
        every = self.recheck_every
        while every and active >= 10 * every:
            every *= 10
        return bool(every) and active % every == 0

    def undo(self, n: int = 1, *, by: str | None = None, note: str = "") -> Operation:
        """Take the last ``n`` active edits off, exactly; see :meth:`emendo.ledger.store.Ledger.undo`."""
        return self.ledger.undo(n, by=by, note=note)

    def revert(self, id: int, *, by: str | None = None, note: str = "") -> tuple[Operation, Examination]:
        """Take one edit off, at any position, and measure those that remain.

        The weights are exactly those of the base model with the other edits. Edits that were made while this one was
        active (:meth:`~emendo.ledger.store.Ledger.later_upon`) may rely on it; the measurement shows
        which of them still hold.

        Raises:
            RequestError: it is not active.
        """
        step = self.ledger.revert(id, by=by, note=note)
        return step, self.examine(keep=True)

    def examine(self, *, keep: bool = False) -> Examination:
        """Measure every active edit again, and the drift on the probes.

        Args:
            keep: store the figures in the ledger.
        """
        found = self._guard.examine(self.ledger.head)
        if keep:
            self.ledger.add_check(found.as_dict(), operation=found.operation)
        return found


def _of_weights(edit: BaseEdit) -> Edit:
    return as_weights(edit, "A ledger stores changes of weights")


def _description(edit: Edit) -> NewEntry:
    return NewEntry(
        editor=edit.origin.editor,
        version=edit.origin.version,
        requests=tuple(request.as_dict() for request in edit.origin.requests),
        made=edit.origin.date,
        upon=edit.origin.upon,
        rank=edit.rank,
        card=edit.card,
        chat=edit.origin.chat,
    )


def _ledger(lm: LM, where: Where | None, create: bool) -> Ledger:
    if not create or (where is None and find_ledger(lm.name) is not None):
        return open_ledger(lm.name, lm.fingerprint, where)
    try:
        return create_ledger(lm.name, lm.fingerprint, where)
    except StorageError as failed:
        try:  # another process has created it, or it is elsewhere and named for the first time here
            return open_ledger(lm.name, lm.fingerprint, where)
        except StorageError:
            raise failed from None
