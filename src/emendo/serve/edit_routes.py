"""The ledger's edits over HTTP: add, list, look at, revert, undo, tag, and ask which one answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query

from emendo._storage import finite_values
from emendo.errors import RequestError
from emendo.ledger import Entry, Operation
from emendo.memory import Choice
from emendo.serve.editing import NewEdit
from emendo.serve.schemas import (
    EditBody,
    EditList,
    ErrorBody,
    FullEditBody,
    NewEditBody,
    NewTagBody,
    StepBody,
    TagBody,
    UndoBody,
    WhyBody,
)
from emendo.serve.security import Editing
from emendo.serve.service import Found, Service

router = APIRouter(tags=["Edits"])
Id = Annotated[int, Path(ge=1, lt=2**31)]


@router.post("/v1/edits", responses={409: {"model": ErrorBody, "description": "The guard refuses it."}})
async def add(body: NewEditBody, found: Found, caller: Editing) -> StepBody:
    """Make an edit. When this returns, every later request is answered with it."""
    new = NewEdit(
        body.prompt,
        body.target,
        body.paraphrases,
        body.subject,
        body.aliases,
        body.note,
        body.force,
        caller.signature(body.by),
    )
    return _counted(found, await found.desk.add(new))


@router.get("/v1/edits")
async def edits(
    found: Found,
    search: Annotated[str, Query(max_length=1000)] = "",
    active: bool | None = None,
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> EditList:
    """List edits, the latest first."""
    return await found.router.worker.run(some_edits, found, search, active, offset, limit)


@router.get("/v1/edits/{id}")
async def edit(id: Id, found: Found) -> FullEditBody:
    """Show one edit, with the answers before and after it."""
    return await found.router.worker.run(one_edit, found, id)


@router.delete("/v1/edits/{id}")
async def revert(
    id: Id,
    found: Found,
    caller: Editing,
    note: Annotated[str, Query(max_length=10_000)] = "",
    by: Annotated[str | None, Query(max_length=200)] = None,
) -> StepBody:
    """Take one edit off, wherever it stands."""
    await found.router.worker.run(_entry, found, id)
    return _counted(found, await found.desk.revert(id, caller.signature(by), note))


@router.post("/v1/undo")
async def undo(body: UndoBody, found: Found, caller: Editing) -> StepBody:
    """Take the last edits off."""
    return _counted(found, await found.desk.undo(body.n, caller.signature(body.by), body.note))


@router.get("/v1/tags")
async def tags(found: Found) -> list[TagBody]:
    """List the names of states."""
    return [TagBody(**asdict(tag)) for tag in await found.router.worker.run(found.ledger.tags)]


@router.post("/v1/tags")
async def tag(body: NewTagBody, found: Found, caller: Editing) -> TagBody:
    """Name a state; it can be asked as ``NAME@TAG``."""
    by = caller.signature(body.by)
    made = await found.router.worker.run(found.ledger.tag, body.name, body.operation, by=by)
    return TagBody(**asdict(made))


@router.post("/v1/why")
async def why(body: WhyBody, found: Found) -> Choice:
    """Tell which edit answers a prompt, and why."""
    state = "head" if body.model is None else found.router.state(body.model)
    if not body.prompt.strip():
        raise RequestError("The prompt is empty.")
    return await found.router.why(body.prompt, state)


def _counted(found: Found, step: Operation) -> StepBody:
    found.metrics.steps.labels(step.kind).inc()
    return _step(step)


def _step(step: Operation) -> StepBody:
    return StepBody(
        id=step.edits[0] if len(step.edits) == 1 else None,
        operation=step.id,
        kind=step.kind,
        edits=list(step.edits),
        active=step.active_count,
        at=step.at,
        by=step.by,
        note=step.note,
        forced=step.forced,
        health=finite_values(step.health),
    )


def _entry(found: Service, id: int) -> Entry:
    try:
        return found.ledger.entry(id)
    except RequestError as error:
        raise HTTPException(404, str(error)) from error


def some_edits(found: Service, search: str, active: bool | None, offset: int, limit: int) -> EditList:
    """A part of the list of edits whose prompts and targets have the given words."""
    head, words = found.ledger.head, search.casefold().split()
    now = set(head.active)
    chosen = [
        entry
        for entry in reversed(found.ledger.entries())
        if (active is None or (entry.id in now) == active) and _mentions(entry, words)
    ]
    scopes = found.ledger.scopes(head.id)
    data = [EditBody(**_values(found, entry, now, scopes)) for entry in chosen[offset : offset + limit]]
    return EditList(operation=head.id, total=len(chosen), data=data)


def _mentions(entry: Entry, words: Sequence[str]) -> bool:
    text = " ".join(f"{each['prompt']} {each['target']}" for each in entry.requests).casefold()
    return all(word in text for word in words)


def one_edit(found: Service, id: int) -> FullEditBody:
    """All that the ledger knows of an edit."""
    entry, head = _entry(found, id), found.ledger.head
    steps = found.ledger.operations_of(id)
    scopes = found.ledger.scopes(head.id)
    return FullEditBody(
        **_values(found, entry, set(head.active), scopes),
        scope=None if id not in scopes else dict(scopes[id]),
        health=finite_values(steps[0].health),
        before_after=finite_values(list(entry.card.get("rows", []))),
        operations=[finite_values(_step(step).model_dump()) for step in steps],
    )


def _values(found: Service, entry: Entry, now: set[int], scopes: Any) -> dict[str, Any]:
    step = found.ledger.operations_of(entry.id)[0]
    return {
        "id": entry.id,
        "active": entry.id in now,
        "requests": [dict(request) for request in entry.requests],
        "editor": entry.editor,
        "made": entry.made,
        "applied": step.at,
        "by": step.by,
        "note": step.note,
        "forced": step.forced,
        "in_weights": entry.id in now and entry.id not in scopes,
        "digest": entry.digest,
    }
