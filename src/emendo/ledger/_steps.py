"""What each kind of step does: from the latest operation, the edits that it touches and those active after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TypeAlias

from sqlalchemy import Connection, insert, select, update

from emendo.errors import RequestError
from emendo.ledger import _schema as queries
from emendo.ledger import _schema as tables
from emendo.ledger._schema import NewEntry, Operation, State

Ids: TypeAlias = tuple[int, ...]
Change: TypeAlias = Callable[[Connection, Operation], tuple[Ids, Ids]]


def apply(data: bytes, about: NewEntry) -> Change:
    """Put an edit on after the others; its bytes and what is known about it are kept if they are new."""
    digest = queries.digest(data)

    def change(connection: Connection, head: Operation) -> tuple[Ids, Ids]:
        id = connection.scalar(select(tables.edits.c.id).where(tables.edits.c.digest == digest))
        if id is None:
            id = queries.next_id(connection, tables.edits)
            connection.execute(insert(tables.payloads).values(digest=digest, data=data))
            values = {field.name: getattr(about, field.name) for field in fields(about)}
            values |= {"id": id, "digest": digest, "bytes": len(data)}
            connection.execute(insert(tables.edits).values(values))
        elif id in head.active:
            raise RequestError(f"This edit is active already: it is edit {id}.")
        elif queries.data(connection, digest) != data:  # damaged since
            kept = tables.payloads.c.digest == digest
            connection.execute(update(tables.payloads).where(kept).values(data=data))
        return (id,), (*head.active, id)

    return change


def undo(n: int) -> Change:
    """Take the last ``n`` off.

    Raises:
        RequestError: ``n`` is not positive.
    """
    if n < 1:
        raise RequestError(f"{n} edits cannot be taken off; give a number from 1.")

    def change(_: Connection, head: Operation) -> tuple[Ids, Ids]:
        if not head.active:
            raise RequestError("No edit is active: there is nothing to take off.")
        if n > len(head.active):
            raise RequestError(
                f"{n} edits cannot be taken off: the number of active ones is {len(head.active)}."
            )
        return head.active[-n:], head.active[:-n]

    return change


def revert(id: int) -> Change:
    """Take one off, wherever it stands."""

    def change(connection: Connection, head: Operation) -> tuple[Ids, Ids]:
        if id not in head.active:
            queries.entry(connection, id)
            newest = select(tables.operations).order_by(tables.operations.c.id.desc())
            steps = (Operation(*row) for row in connection.execute(newest))
            last = next(step for step in steps if id in step.edits)
            raise RequestError(f"Edit {id} is not active: operation {last.id} ({last.kind}) took it off.")
        return (id,), without(head.active, (id,))

    return change


def checkout(state: State) -> Change:
    """Have the edits of an earlier state."""

    def change(connection: Connection, head: Operation) -> tuple[Ids, Ids]:
        then = queries.operation(connection, state).active
        return (*without(then, head.active), *without(head.active, then)), then

    return change


def without(ids: Sequence[int], others: Sequence[int]) -> Ids:
    """The first that are not among the others, in their order."""
    gone = set(others)
    return tuple(id for id in ids if id not in gone)
