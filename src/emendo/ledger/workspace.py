"""A model with its ledger: base weights and the active edits beside them, and the steps from one state to the next.

::

    work = Workspace.open(emendo.load("my-model"))
    work.apply(edit)                    # checked by the guard first
    with work.applied() as lm:
        lm.generate("The capital of Australia is")
    work.undo()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from emendo.edit import AnyEdit, Edit, Request, compose
from emendo.editors import Editor
from emendo.errors import ConflictError, RequestError, StorageError
from emendo.ledger.database import Where
from emendo.ledger.examination import Examination, Holding
from emendo.ledger.guard import Health, Limits, RefusedError, largest_norm, reached
from emendo.ledger.place import create_ledger, find_ledger, open_ledger
from emendo.ledger.probing import Reading, Watch, Watched
from emendo.ledger.queries import State
from emendo.ledger.rows import NewEntry, Operation
from emendo.ledger.store import Ledger
from emendo.models import LM

_ATTEMPTS = 10  # at a step while other processes take theirs


@dataclass(eq=False)
class Workspace:
    """A model and its ledger.

    Attributes:
        lm: the base model; its weights are never changed.
        ledger: which edits are active.
        limits: the guard's.
        watched: what the guard watches.
        recheck_every: the whole stack is measured again whenever so many more edits are active; 0 for never.
    """

    lm: LM
    ledger: Ledger
    limits: Limits = field(default_factory=Limits)
    watched: Watched = field(default_factory=Watched)
    recheck_every: int = 10

    def __post_init__(self) -> None:
        self._edits: dict[int, Edit] = {}
        self._watch: Watch | None = None
        self._readings: dict[tuple[int, ...], Reading] = {}

    @classmethod
    def open(cls, lm: LM, where: Where | None = None, *, create: bool = True, **settings: Any) -> Workspace:
        """A model with its ledger, which is begun if there is none.

        Args:
            lm: the model.
            where: the ledger's folder or SQLAlchemy URL; by default the model's own place
                (:func:`emendo.ledger.place.ledger_of`).
            create: begin a ledger where there is none.
            settings: further attributes of the workspace.

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
        if id not in self._edits:
            self._edits[id] = Edit.from_bytes(self.ledger.load(id))
        return self._edits[id]

    def composed(self, state: State = "head") -> Edit | None:
        """The active edits as one; None where there is none."""
        ids = self.ledger.operation(state).active
        return compose([self.edit(id) for id in ids]) if ids else None

    @contextmanager
    def applied(self, state: State = "head") -> Iterator[LM]:
        """The working model for the length of a ``with`` block: the base with all active edits.

        Args:
            state: an earlier operation, or a tag, instead of the present state.
        """
        with self._under(self.ledger.operation(state).active):
            yield self.lm

    @contextmanager
    def _under(self, ids: Sequence[int], *more: Edit) -> Iterator[None]:
        edits = [*(self.edit(id) for id in ids), *more]
        if not edits:
            yield
            return
        with compose(edits).applied(self.lm):
            yield

    def make(self, editor: Editor, requests: Sequence[Request]) -> Edit:
        """An edit that an editor makes upon the working model, and that knows so; it is not applied yet.

        Raises:
            RequestError: the editor's edits change no weights, or a request does not fit the model.
        """
        if editor.host(self.lm) is not self.lm:
            raise RequestError(f"{editor.name} edits a model that it trained itself, not {self.lm.name}.")
        head = self.ledger.head
        with self._under(head.active):
            edit = _of_weights(editor.edit(self.lm, requests))
        return self.upon(edit, head)

    def upon(self, edit: Edit, operation: Operation) -> Edit:
        """The same edit, which knows that it was made upon the edits that were active after an operation."""
        digests = tuple(entry.digest for entry in self.ledger.entries(operation.active))
        return replace(edit, origin=replace(edit.origin, upon=digests))

    # ------------------------------------------------------------------------------------------ steps

    def check(self, edit: AnyEdit, paraphrases: Sequence[str] = ()) -> Health:
        """The guard's figures of an edit on top of the active ones; nothing is applied.

        Args:
            edit: the edit.
            paraphrases: rewordings of its one request.

        Raises:
            MismatchError: it was made for another model.
            RequestError: it changes no weights, or rewordings for an edit of several requests.
        """
        return self._health(self.ledger.head.active, _of_weights(edit), paraphrases)

    def apply(
        self,
        edit: AnyEdit,
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
            health = self._health(head.active, change, paraphrases)
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
        head = self.ledger.head
        entries = self.ledger.entries(head.active)
        pairs = [(r["prompt"], r["target"]) for entry in entries for r in entry.requests]
        with self._under(head.active):
            right = iter(reached(self.lm, pairs))
        holdings = tuple(Holding(entry, tuple(next(right) for _ in entry.requests)) for entry in entries)
        drift = self._reading(head.active).drift(self._reading(()), {prompt for prompt, _ in pairs})
        found = Examination(head.id, holdings, drift)
        if keep:
            self.ledger.add_check(found.as_dict(), operation=head.id)
        return found

    # ------------------------------------------------------------------------------------------ measuring

    @torch.no_grad()
    def _health(self, active: Sequence[int], edit: Edit, paraphrases: Sequence[str]) -> Health:
        edit.check(self.lm)
        requests = edit.origin.requests
        if paraphrases and len(requests) != 1:
            raise RequestError(f"Rewordings belong to an edit of one request; this one has {len(requests)}.")
        before, clean = self._reading(tuple(active)), self._reading(())
        with self._under(active, edit):
            right = reached(self.lm, [(r.prompt, r.target) for r in requests])
            reworded = reached(self.lm, [(text, requests[0].target) for text in paraphrases])
            after = self._watcher.read()
        asked = {r["prompt"] for entry in self.ledger.entries(active) for r in entry.requests}
        asked |= {*(r.prompt for r in requests), *paraphrases}
        return Health.of(
            reached=fmean(map(float, right)) if right else 1.0,
            reworded=fmean(map(float, reworded)) if reworded else None,
            norm=largest_norm(edit, self.lm),
            own=after.drift(before, asked),
            total=after.drift(clean, asked),
        )

    @property
    def _watcher(self) -> Watch:
        if self._watch is None:
            self._watch = Watch(self.lm, self.watched)
        return self._watch

    def _reading(self, active: tuple[int, ...]) -> Reading:
        """What is watched, under some edits; the clean model's reading and the last one are kept."""
        if active not in self._readings:
            with self._under(active):
                reading = self._watcher.read()
            self._readings = {key: value for key, value in self._readings.items() if not key}
            self._readings[active] = reading
        return self._readings[active]


def _of_weights(edit: AnyEdit) -> Edit:
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
