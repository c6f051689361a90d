"""The edits in force for a request, by the ledger as it stands when the request arrives.

The ledger is the only state. Its latest operation is read for each batch of requests, so that a step that any process
took is seen by the next request.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from emendo.errors import RequestError
from emendo.ledger import Ledger, Operation
from emendo.ledger.workspace import Workspace
from emendo.memory.bank import Choice, EditMemory
from emendo.models.lm import LM
from emendo.serve._worker import Together, Worker
from emendo.serve.backend import InForce, Part

BASE = "base"
"""The state without edits: ``NAME@base``."""
_STATES = 4  # states that are kept ready

Edits = Literal["auto", "off"] | tuple[int, ...]
"""The router decides; the base model; or exactly these edits."""


class UnknownModelError(RequestError):
    """There is no model of that name."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be routed.

    Attributes:
        asked: a prompt, or what the user said in each turn of a conversation.
        edits: which edits may be in force.
        state: of the ledger: ``"head"``, a tag, an operation's number, or ``"base"``.
    """

    asked: str | tuple[str, ...]
    edits: Edits = "auto"
    state: str = "head"


class Router:
    """Finds the edits in force.

    Args:
        lm: the model, which only this router runs.
        ledger: its ledger.
        worker: the thread that runs it.
        name: the name by which clients know the model; by default the last part of its own.

    Attributes:
        head: the latest operation of the ledger when it was last read; None before the first time.
    """

    def __init__(self, lm: LM, ledger: Ledger, worker: Worker, name: str | None = None) -> None:
        self.lm, self.ledger, self.worker = lm, ledger, worker
        self.name = name or Path(lm.name).name
        self._states: OrderedDict[int, _State] = OrderedDict()
        self._tags: dict[str, int] = {}
        self.head: Operation | None = None
        self.route = Together(worker, self._route)

    def state(self, model: str) -> str:
        """The state that a model's name stands for.

        Raises:
            UnknownModelError: it is another model.
        """
        name, sign, state = model.partition("@")
        if name != self.name or (sign and not state):
            raise UnknownModelError(
                f"There is no model {model!r}; this server has {self.name!r}, the same at a tag ({self.name}@TAG), "
                f"and the base model ({self.name}@{BASE})."
            )
        return state or "head"

    def models(self) -> list[str]:
        """The names of the working model, the base model and the state at each tag."""
        tags = [tag.name for tag in self.ledger.tags() if tag.name != BASE]
        return [self.name, *(f"{self.name}@{each}" for each in (BASE, *tags))]

    def latest(self) -> Operation:
        """The latest operation of the ledger, read now."""
        self.head = self.ledger.head
        return self.head

    async def why(self, prompt: str, state: str = "head") -> Choice:
        """The router's choice for a prompt."""
        return await self.worker.run(lambda: self._state(state).memory.why(prompt))

    def _route(self, questions: Sequence[Question]) -> list[InForce | Exception]:
        head: _State | None = None
        found: list[InForce | Exception] = []
        by_state: dict[int, tuple[_State, list[int]]] = {}
        for i, question in enumerate(questions):
            found.append(InForce(0))
            try:
                if question.state == BASE or question.edits == "off":
                    continue
                if question.state == "head":
                    state = head = head or self._state("head")
                else:
                    state = self._state(question.state)
                if question.edits == "auto":
                    by_state.setdefault(state.operation.id, (state, []))[1].append(i)
                else:
                    found[i] = state.named(question.edits)
            except Exception as error:  # noqa: BLE001 - of this question alone
                found[i] = error
        for state, rows in by_state.values():
            for row, force in zip(rows, state.route([questions[i].asked for i in rows]), strict=True):
                found[row] = force
        return found

    def _state(self, name: str) -> _State:
        """A state that is ready, made if need be; those used last are kept."""
        operation = self.latest() if name == "head" else self._named(name)
        if operation.id not in self._states:
            self._states[operation.id] = self._made(operation, head=name == "head")
        self._states.move_to_end(operation.id)
        while len(self._states) > _STATES:
            self._states.popitem(last=False)
        return self._states[operation.id]

    def _named(self, name: str) -> Operation:
        if name not in self._tags:
            try:
                self._tags[name] = self.ledger.operation(name).id
            except RequestError as error:
                raise UnknownModelError(str(error)) from error
        kept = self._states.get(self._tags[name])
        return self.ledger.operation(name) if kept is None else kept.operation

    def _made(self, operation: Operation, *, head: bool) -> _State:
        """The state after an operation. The head's memory is brought forward from the head before it."""
        if not head:
            return _State(operation, Workspace(self.lm, self.ledger))
        for id, state in list(self._states.items()):
            if state.follows_head:
                del self._states[id]
                return _State(operation, state.work, follows_head=True)
        return _State(operation, Workspace(self.lm, self.ledger), follows_head=True)


@dataclass(frozen=True)
class _State:
    """The edits that are active after an operation."""

    operation: Operation
    work: Workspace
    follows_head: bool = False

    @cached_property
    def memory(self) -> EditMemory:
        return self.work.memory(self.operation.id)

    @cached_property
    def weights(self) -> tuple[Part, ...]:
        """The edits that are in the weights, as one part."""
        in_memory = self.work.ledger.scopes(self.operation.id)
        ids = tuple(id for id in self.operation.active if id not in in_memory)
        edit = self.work.composed(self.operation.id)
        if edit is None:
            return ()
        digests = self.work.ledger.digests(ids)
        digest = digests[0] if len(ids) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return (Part(digest, edit, ids),)

    def part(self, id: int, score: float | None = None) -> Part:
        return Part(self.work.ledger.digests([id])[0], self.work.edit(id), (id,), score)

    def named(self, ids: Sequence[int]) -> InForce:
        for id in ids:
            if id not in self.operation.active:
                raise RequestError(f"Edit {id} is not active, so it cannot answer.")
        return InForce(self.operation.id, tuple(self.part(id) for id in dict.fromkeys(ids)))

    def route(self, asked: Sequence[str | Sequence[str]]) -> list[InForce]:
        """The edits in force for prompts or conversations."""
        return [self._in_force(choice) for choice in self.memory.route(asked)]

    def _in_force(self, choice: Choice) -> InForce:
        routed = () if choice.edit is None else (self.part(choice.edit, choice.score),)
        best = choice.best
        score = None if best is None else choice.score
        return InForce(self.operation.id, (*self.weights, *routed), best, score, choice.threshold)
