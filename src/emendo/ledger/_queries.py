"""Queries of the ledger's tables within one transaction: states, edits, and the effect of each kind of step."""

from __future__ import annotations

import getpass
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from itertools import chain
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    String,
    TableClause,
    and_,
    func,
    insert,
    or_,
    select,
    type_coerce,
    update,
)

from emendo._text import normalised
from emendo.errors import RequestError, StorageError
from emendo.ledger import _schema as schema
from emendo.ledger._schema import Entry, NewEntry, Operation, Payload, Period, State, Values

T = TypeVar("T")

_BATCH = 500  # values in one IN clause
_LARGEST = 2**31 - 1  # number that every database holds


# ------------------------------------------------------------------------------------------------- states


def head(connection: Connection) -> Operation:
    """The latest operation.

    Raises:
        StorageError: there is none.
    """
    newest = select(schema.operations).order_by(schema.operations.c.id.desc()).limit(1)
    if (row := connection.execute(newest).first()) is None:
        raise StorageError("The ledger is damaged: it has no operations. Restore a copy of it.")
    return Operation(*row)


def operation(connection: Connection, state: State) -> Operation:
    """The operation of a state.

    Raises:
        RequestError: there is none.
    """
    if state == "head":
        return head(connection)
    number = int(state) if isinstance(state, int) or (state.isdecimal() and len(state) < 20) else None
    if number is None:
        number = connection.scalar(select(schema.tags.c.operation).where(schema.tags.c.name == state))
    if number is None:
        names = ", ".join(connection.scalars(select(schema.tags.c.name).order_by(schema.tags.c.name)))
        raise RequestError(f"There is no tag {state!r}; the tags are: {names or 'none'}.")
    row = None
    if 0 <= number <= _LARGEST:
        row = connection.execute(select(schema.operations).where(schema.operations.c.id == number)).first()
    if row is None:
        raise RequestError(f"There is no operation {number}; the latest is {head(connection).id}.")
    return Operation(*row)


def active_after(operation: int) -> ColumnElement[bool]:
    """The condition on the table of periods that selects the edits active after an operation."""
    c = schema.periods.c
    return and_(c.since <= operation, or_(c.until.is_(None), c.until > operation))


_active_now = schema.periods.c.until.is_(None)


def active(connection: Connection, operation: int) -> tuple[int, ...]:
    """Numbers of the edits active after an operation, in their order."""
    return tuple(edit for edit, _ in places(connection, operation))


def places(connection: Connection, operation: int) -> list[tuple[int, int]]:
    """Numbers and positions of the edits active after an operation, in their order.

    Raises:
        StorageError: an edit or a position is there twice.
    """
    found = [row[:2] for row in _period_rows(connection, operation, operation)]
    if any(len(set(column)) < len(found) for column in zip(*found, strict=True)):
        raise StorageError(
            f"The ledger is damaged: the active edits of operation {operation} overlap. Restore a copy of it."
        )
    return found


def scopes(connection: Connection, operation: int) -> dict[int, Values]:
    """By number, the scopes of the edits that were in the memory after an operation."""
    c = schema.periods.c
    asked = select(c.edit, c.scope).where(active_after(operation), c.scope.is_not(None)).order_by(c.position)
    return {row.edit: row.scope for row in connection.execute(asked)}


def periods_between(connection: Connection, first: int, last: int) -> list[Period]:
    """The times of edits that were active after any operation from the first to the last, by position.

    Raises:
        StorageError: a value is not a number.
    """
    return [Period(*row) for row in _period_rows(connection, first, last)]


def _period_rows(connection: Connection, first: int, last: int) -> list[Any]:
    """The same as plain rows: a state may have many, so that they are read and checked all at once."""
    c = schema.periods.c
    numbers = (c.edit, c.position, c.since, c.until)
    asked = select(*(type_coerce(column, Integer) for column in numbers)).order_by(c.position)
    asked = asked.where(c.since <= last, or_(c.until.is_(None), c.until > first))
    rows: list[Any] = [*connection.execute(asked).all()]
    edits, positions, starts, ends = zip(*rows, strict=True) if rows else ((), (), (), ())
    if {*map(type, chain(edits, positions, starts))} - {int} or {*map(type, ends)} - {int, type(None)}:
        raise StorageError("The ledger is damaged: a time of an edit is not a number. Restore a copy of it.")
    return rows


# -------------------------------------------------------------------------------------------------- edits


def entry(connection: Connection, id: int) -> Entry:
    """The description of an edit.

    Raises:
        RequestError: the ledger has no edit of that number.
    """
    row = None
    if 0 <= id <= _LARGEST:
        row = connection.execute(select(schema.edits).where(schema.edits.c.id == id)).first()
    if row is None:
        last = next_id(connection, schema.edits) - 1
        raise RequestError(
            f"There is no edit {id}; {f'the last is {last}' if last else 'there are none yet'}."
        )
    return Entry(*row)


def entries(connection: Connection, ids: Iterable[int]) -> dict[int, Entry]:
    """The descriptions of those edits of the given numbers that the ledger has."""
    found: dict[int, Entry] = {}
    for part in _batches(ids):
        rows = connection.execute(select(schema.edits).where(schema.edits.c.id.in_(part)))
        found |= {row.id: Entry(*row) for row in rows}
    return found


def payloads(connection: Connection, ids: Sequence[int], size: int) -> Iterator[tuple[int, str, bytes]]:
    """Number, digest and bytes of edits, in the given order; missing bytes are empty. Reads ``size`` at a time."""
    joined = schema.edits.outerjoin(schema.payloads, schema.payloads.c.digest == schema.edits.c.digest)
    c = schema.edits.c
    asked = select(c.id, c.digest, func.coalesce(schema.payloads.c.data, b"")).select_from(joined)
    for part in _batches(ids, size):
        rows = {row[0]: row for row in connection.execute(asked.where(c.id.in_(part)))}
        for id in part:
            if id not in rows:
                raise StorageError(f"The ledger is damaged: edit {id} is missing. Restore a copy of it.")
            yield tuple(rows[id])


def digests(connection: Connection, ids: Sequence[int]) -> list[str]:
    """The digests of edits, in the given order.

    Raises:
        StorageError: the ledger has no edit of one of the numbers.
    """
    c = schema.edits.c
    asked = select(type_coerce(c.id, Integer), type_coerce(c.digest, String))
    if len(ids) <= _BATCH:
        asked = asked.where(c.id.in_(ids))
    found: dict[int, Any] = {row[0]: row[1] for row in connection.execute(asked).all()}
    if lost := without(ids, found):
        raise StorageError(f"The ledger is damaged: edit {lost[0]} is missing. Restore a copy of it.")
    wanted = [found[id] for id in ids]
    if not {*map(type, wanted)} <= {str}:
        raise StorageError("The ledger is damaged: a digest is not text. Restore a copy of it.")
    return wanted


def ids(connection: Connection, digests: Iterable[str]) -> list[int]:
    """Numbers of the edits of the given digests that the ledger has."""
    c, found = schema.edits.c, list[int]()
    for part in _batches(digests):
        found += connection.scalars(select(c.id).where(c.digest.in_(part)))
    return found


def has_chat_edits(connection: Connection) -> bool:
    """Whether an active edit was made from prompts in a chat template."""
    joined = schema.periods.join(schema.edits, schema.edits.c.id == schema.periods.c.edit)
    asked = select(schema.edits.c.id).select_from(joined).where(_active_now, schema.edits.c.chat).limit(1)
    return connection.scalar(asked) is not None


def with_prompts(connection: Connection, prompts: Iterable[str], operation: int) -> list[int]:
    """Numbers of the edits active after an operation that have one of the prompts, compared after normalising."""
    joined = schema.periods.join(schema.prompts, schema.prompts.c.edit == schema.periods.c.edit)
    found: set[int] = set()
    for part in _batches({prompt_digest(prompt) for prompt in prompts}):
        asked = select(schema.periods.c.edit).select_from(joined).where(schema.prompts.c.digest.in_(part))
        found |= set(connection.scalars(asked.where(active_after(operation))))
    return sorted(found)


def next_id(connection: Connection, table: TableClause) -> int:
    """The number of a table's next row, counted from 1."""
    return 1 + int(connection.scalar(select(func.coalesce(func.max(table.c.id), 0))) or 0)


# -------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Change:
    """The effect of a step on the set of active edits.

    Attributes:
        edits: numbers of the edits that it concerns.
        off: numbers of those to deactivate.
        on: numbers and positions of those to activate.
        scopes: by number, the scopes of those that go into the memory.
    """

    edits: tuple[int, ...]
    off: Sequence[int] = ()
    on: Sequence[tuple[int, int]] = field(default=())
    scopes: Mapping[int, Values] = field(default_factory=dict)


Plan: TypeAlias = Callable[[Connection, Operation], Change]
"""Finds the change that a step makes, given the latest operation."""


def record(connection: Connection, change: Change, step: Operation) -> None:
    """Store an operation and its change."""
    connection.execute(step.insert())
    for part in _batches(change.off):
        ended = update(schema.periods).where(schema.periods.c.edit.in_(part), _active_now)
        connection.execute(ended.values(until=step.id))
    rows = [
        {"edit": edit, "position": position, "since": step.id, "scope": change.scopes.get(edit)}
        for edit, position in change.on
    ]
    if rows:
        connection.execute(insert(schema.periods).values(until=None), rows)


def plan_apply(data: bytes, about: NewEntry, scope: Values | None = None) -> Plan:
    """Activate an edit after the others, in the memory if it has a scope.

    Its bytes and description are stored if they are new.
    """
    digest = hashlib.sha256(data).hexdigest()

    def plan(connection: Connection, head: Operation) -> Change:
        id = connection.scalar(select(schema.edits.c.id).where(schema.edits.c.digest == digest))
        if id is None:
            id = next_id(connection, schema.edits)
            connection.execute(Payload(digest, data).insert())
            given = {f.name: getattr(about, f.name) for f in fields(about)}
            connection.execute(Entry(id=id, digest=digest, bytes=len(data), **given).insert())
            keys = {prompt_digest(str(request.get("prompt", ""))) for request in about.requests}
            if keys:
                connection.execute(insert(schema.prompts), [{"edit": id, "digest": key} for key in keys])
        elif _position(connection, id) is not None:
            raise RequestError(f"This edit is active already: it is edit {id}.")
        else:
            _restore(connection, digest, data)
        return Change((id,), on=[(id, head.id + 1)], scopes={} if scope is None else {id: scope})

    return plan


def _restore(connection: Connection, digest: str, data: bytes) -> None:
    """Write the bytes of a known edit again if they were lost or damaged."""
    same = schema.payloads.c.digest == digest
    kept = connection.scalar(select(schema.payloads.c.data).where(same))
    if kept is None:
        connection.execute(Payload(digest, data).insert())
    elif kept != data:
        connection.execute(update(schema.payloads).where(same).values(data=data))


def plan_undo(n: int) -> Plan:
    """Deactivate the last ``n`` edits.

    Raises:
        RequestError: ``n`` is not positive.
    """
    if n < 1:
        raise RequestError(f"{n} edits cannot be taken off; give a number from 1.")

    def plan(connection: Connection, head: Operation) -> Change:
        if not head.active_count:
            raise RequestError("No edit is active: there is nothing to take off.")
        if n > head.active_count:
            raise RequestError(
                f"{n} edits cannot be taken off: the number of active ones is {head.active_count}."
            )
        c = schema.periods.c
        last = select(c.edit).where(_active_now).order_by(c.position.desc()).limit(n)
        ids = tuple(connection.scalars(last))[::-1]
        return Change(ids, off=ids)

    return plan


def plan_revert(id: int) -> Plan:
    """Deactivate one edit at any position."""

    def plan(connection: Connection, head: Operation) -> Change:
        if _position(connection, id) is None:
            entry(connection, id)
            c = schema.periods.c
            last = connection.scalar(select(c.until).where(c.edit == id).order_by(c.until.desc()).limit(1))
            if last is None:
                raise StorageError(
                    f"The ledger is damaged: edit {id} was never active. Restore a copy of it."
                )
            step = operation(connection, last)
            raise RequestError(f"Edit {id} is not active: operation {step.id} ({step.kind}) took it off.")
        return Change((id,), off=(id,))

    return plan


def plan_checkout(state: State) -> Plan:
    """Activate the edits of an earlier state, in their order there."""

    def plan(connection: Connection, head: Operation) -> Change:
        earlier = operation(connection, state).id
        then, now = places(connection, earlier), places(connection, head.id)
        on, off = without(then, now), without(now, then)
        new, old = [edit for edit, _ in on], [edit for edit, _ in off]
        return Change(
            (*without(new, old), *without(old, new)), off=old, on=on, scopes=scopes(connection, earlier)
        )

    return plan


def _position(connection: Connection, id: int) -> int | None:
    """The position of an active edit; None if it is not active."""
    if not 0 <= id <= _LARGEST:
        return None
    found: int | None = connection.scalar(
        select(schema.periods.c.position).where(schema.periods.c.edit == id, _active_now)
    )
    return found


def periods_of(connection: Connection, id: int) -> list[Period]:
    """All times during which an edit was active."""
    asked = select(schema.periods).where(schema.periods.c.edit == id)
    return [Period(*row) for row in connection.execute(asked)]


def without(values: Iterable[T], others: Iterable[T]) -> list[T]:
    """The values that are not among the others, in their order."""
    gone = set(others)
    return [value for value in values if value not in gone]


# ------------------------------------------------------------------------------------------------- values


def _batches(values: Iterable[T], size: int = _BATCH) -> Iterator[list[T]]:
    left = list(values)
    for start in range(0, len(left), size):
        yield left[start : start + size]


def prompt_digest(prompt: str) -> str:
    """A hash that prompts share which differ in case, spacing or Unicode form only."""
    return hashlib.sha256(normalised(prompt).encode(errors="surrogatepass")).hexdigest()[:32]


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """The user of this process; ``"unknown"`` where the system has no name for them."""
    try:
        return storable("user name", getpass.getuser())
    except (ImportError, KeyError, OSError, RequestError):
        return "unknown"


def storable(what: str, text: str) -> str:
    """The same text, if every database can store it.

    Raises:
        RequestError: it is not valid Unicode or has a zero byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"The {what} {text!r} cannot be written as UTF-8.") from None
    if "\0" in text:
        raise RequestError(f"The {what} {text!r} holds a zero byte.")
    return text
