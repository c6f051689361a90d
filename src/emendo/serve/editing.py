"""Edits over HTTP: made and judged as the commands ``edit --apply``, ``revert`` and ``undo`` do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emendo.editors import Editor
from emendo.edits import Request
from emendo.edits.edit import as_weights
from emendo.errors import RequestError
from emendo.evaluate import Question, edit_with_answers
from emendo.ledger import Operation
from emendo.ledger.workspace import Workspace
from emendo.serve._worker import Worker
from emendo.serve.previewing import Preview, preview


@dataclass(frozen=True, slots=True)
class NewEdit:
    """An edit that a client asks for.

    Attributes:
        prompt: the text before the answer.
        target: the new answer.
        paraphrases: further prompts that ask for it; the guard tests them, and the router knows them.
        subject: of the fact, as the prompt names it; None guesses it.
        aliases: other names of the subject.
        note: a comment for the ledger.
        force: apply it even if the guard refuses it.
        by: who asks, and from where.
    """

    prompt: str
    target: str
    paraphrases: Sequence[str] = ()
    subject: str | None = None
    aliases: Sequence[str] = ()
    note: str = ""
    force: bool = False
    by: str | None = None

    def scope(self) -> dict[str, Any]:
        """As :meth:`emendo.ledger.workspace.Workspace.apply` takes it."""
        values = {"subject": self.subject, "paraphrases": self.paraphrases, "aliases": self.aliases}
        return {name: value for name, value in values.items() if value}


class EditingDesk:
    """Makes edits and takes them off, on a thread and a module tree of its own beside the one that answers.

    Args:
        work: the model, which nothing else runs at the same time, with its ledger and guard.
        editor: makes the edits.
    """

    def __init__(self, work: Workspace, editor: Editor) -> None:
        if why := editor.no_changes_of(work.lm):
            raise RequestError(f"A ledger stores changes of weights; {why}. Give another editor.")
        self.work, self.editor = work, editor
        self._worker = Worker("emendo-edits")

    def prepare(self) -> None:
        """Take the guard's measurements before the first edit is asked for."""
        self._worker.submit(self.work.prepare)

    async def add(self, new: NewEdit) -> Operation:
        """Make an edit and apply it, unless the guard refuses it; every later request is answered with it.

        Raises:
            RefusedError: the guard refuses it; nothing was applied.
            RequestError: a text does not fit the model.
        """
        return await self._worker.run(self._add, new)

    async def preview(self, new: NewEdit, neighbours: Sequence[str] = ()) -> Preview:
        """Make an edit and try it, with further prompts that must stay as they are; nothing is applied.

        Raises:
            RequestError: a text does not fit the model.
        """
        request, scope = Request(new.prompt, new.target), new.scope()
        return await self._worker.run(
            preview, self.work, self.editor, request, new.paraphrases, neighbours, scope
        )

    async def revert(self, id: int, by: str | None = None, note: str = "") -> Operation:
        """Take one edit off, wherever it stands.

        Raises:
            RequestError: it is not active.
        """
        return await self._worker.run(self.work.ledger.revert, id, by=by, note=note)

    async def undo(self, n: int = 1, by: str | None = None, note: str = "") -> Operation:
        """Take the last edits off.

        Raises:
            RequestError: fewer are active.
        """
        return await self._worker.run(self.work.ledger.undo, n, by=by, note=note)

    def _add(self, new: NewEdit) -> Operation:
        work, head = self.work, self.work.ledger.head
        asked = [Question("edit", new.prompt), *(Question("paraphrase", text) for text in new.paraphrases)]
        with work.in_weights(head):
            edit, _ = edit_with_answers(work.lm, self.editor, Request(new.prompt, new.target), asked, k=1)
        return work.apply(
            work.upon(as_weights(edit, "A ledger stores changes of weights"), head),
            paraphrases=new.paraphrases,
            scope=new.scope(),
            force=new.force,
            by=new.by,
            note=new.note,
        )

    def close(self) -> None:
        """End after the edit that is being made."""
        self._worker.close()
