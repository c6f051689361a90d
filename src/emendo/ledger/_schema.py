"""What the ledger's tables hold, one class for each."""

from __future__ import annotations

import getpass
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypeAlias

from sqlalchemy import (
    Boolean,
    Connection,
    Dialect,
    Integer,
    LargeBinary,
    String,
    TableClause,
    Text,
    column,
    func,
    insert,
    select,
    table,
)
from sqlalchemy.types import TypeDecorator

from emendo.errors import RequestError, StorageError


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What the ledger is told about an edit before it has a number.

    Attributes:
        editor: the name of the method that made it.
        version: of emendo, when it was made.
        requests: what was asked, as JSON objects such as ``{"prompt": ..., "target": ...}``.
        made: when, ISO 8601 in UTC.
        upon: digests of the edits that stood in the model while it was made.
        rank: the highest among its sites; None for an edit that changes no weights.
        card: figures that its maker wanted to keep, as JSON values.
    """

    editor: str
    version: str
    requests: tuple[Mapping[str, Any], ...]
    made: str
    upon: tuple[str, ...] = ()
    rank: int | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """An edit that the ledger knows, active or not. Beside the fields of :class:`NewEntry` it has these.

    Attributes:
        id: its number, from 1; it keeps it for good.
        digest: the SHA-256 of its bytes, in hex.
        bytes: how many they are.
    """

    id: int
    digest: str
    editor: str
    version: str
    requests: tuple[Mapping[str, Any], ...]
    made: str
    upon: tuple[str, ...]
    bytes: int
    rank: int | None
    card: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of the ledger, and the state after it.

    Attributes:
        id: its number: 0 is the beginning, with no edit active.
        parent: the number of the step before; None at the beginning.
        kind: ``begin``, ``apply``, ``undo``, ``revert`` or ``checkout``.
        edits: numbers of the edits that it put on or took off.
        active: numbers of the edits active after it, in the order in which they were put on.
        at: when, ISO 8601 in UTC.
        by: who.
        note: why, in that person's words.
        forced: whether it was done although the guard refused it.
        health: the guard's figures, as JSON values; None if nothing was measured.
    """

    id: int
    parent: int | None
    kind: str
    edits: tuple[int, ...]
    active: tuple[int, ...]
    at: str
    by: str
    note: str
    forced: bool
    health: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Tag:
    """A name for the state after an operation; it is given once."""

    name: str
    operation: int
    at: str
    by: str


@dataclass(frozen=True, slots=True)
class Check:
    """Figures of the whole stack of active edits, measured after an operation."""

    id: int
    operation: int
    at: str
    figures: Mapping[str, Any]


# --------------------
# The ledger's tables as the store asks them. What the database itself knows of them is made in ``migrations``.


class Json(TypeDecorator[Any]):
    """JSON as text, alike on every database; a figure may be infinite or not a number, which theirs forbids."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """To text."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """From text."""
        try:
            return None if value is None else json.loads(value)
        except ValueError as error:
            raise StorageError(f"The ledger is damaged: {value!r:.80} is no JSON ({error}).") from error


class JsonTuple(Json):
    """A JSON list, read as a tuple."""

    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """From text."""
        return tuple(super().process_result_value(value, dialect))


about = table(
    "about",
    column("ledger", String),
    column("fingerprint", String),
    column("model", String),
    column("created", String),
)
payloads = table("payloads", column("digest", String), column("data", LargeBinary))
edits = table(
    "edits",
    column("id", Integer),
    column("digest", String),
    column("editor", String),
    column("version", String),
    column("requests", JsonTuple),
    column("made", String),
    column("upon", JsonTuple),
    column("bytes", Integer),
    column("rank", Integer),
    column("card", Json),
)
operations = table(
    "operations",
    column("id", Integer),
    column("parent", Integer),
    column("kind", String),
    column("edits", JsonTuple),
    column("active", JsonTuple),
    column("at", String),
    column("by", String),
    column("note", String),
    column("forced", Boolean),
    column("health", Json),
)
tags = table(
    "tags", column("name", String), column("operation", Integer), column("at", String), column("by", String)
)
checks = table(
    "checks",
    column("id", Integer),
    column("operation", Integer),
    column("at", String),
    column("figures", Json),
)


# --------------------
# Questions to the ledger's tables within one transaction, and the values that go into them.

State: TypeAlias = int | str
"""An operation's number, as such or as text; a tag's name; or ``"head"``."""


def head(connection: Connection) -> Operation:
    """The latest operation.

    Raises:
        StorageError: there is none, not even the beginning.
    """
    newest = select(operations).order_by(operations.c.id.desc()).limit(1)
    if (row := connection.execute(newest).first()) is None:
        raise StorageError("The ledger is damaged: it has no operations.")
    return Operation(*row)


def operation(connection: Connection, state: State) -> Operation:
    """The operation of a state.

    Raises:
        RequestError: there is none.
    """
    if state == "head":
        return head(connection)
    number = int(state) if isinstance(state, int) or state.isdecimal() else None
    if number is None:
        named = select(tags.c.operation).where(tags.c.name == state)
        number = connection.scalar(named)
    if number is None:
        names = ", ".join(connection.scalars(select(tags.c.name).order_by(tags.c.name)))
        raise RequestError(f"There is no tag {state!r}; the tags are: {names or 'none'}.")
    row = connection.execute(select(operations).where(operations.c.id == number)).first()
    if row is None:
        raise RequestError(f"There is no operation {number}; the latest is {head(connection).id}.")
    return Operation(*row)


def entry(connection: Connection, id: int) -> Entry:
    """What is known about an edit.

    Raises:
        RequestError: there is none of that number.
    """
    row = connection.execute(select(edits).where(edits.c.id == id)).first()
    if row is None:
        known = next_id(connection, edits) - 1
        raise RequestError(
            f"There is no edit {id}; {f'the last is {known}' if known else 'there are none yet'}."
        )
    return Entry(*row)


def data(connection: Connection, digest: str) -> bytes:
    """The bytes kept under a digest; none if they are lost."""
    kept = select(payloads.c.data).where(payloads.c.digest == digest)
    return bytes(connection.scalar(kept) or b"")


def next_id(connection: Connection, table: TableClause) -> int:
    """The number of a table's next row, from 1."""
    return 1 + (connection.scalar(select(func.max(table.c.id))) or 0)


def put(connection: Connection, table: TableClause, row: Any) -> None:
    """Insert a dataclass as a row."""
    connection.execute(insert(table).values({field.name: getattr(row, field.name) for field in fields(row)}))


def digest(data: bytes) -> str:
    """The SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """Who runs this process; ``"unknown"`` where the system has no name for them."""
    try:
        return writable("user name", getpass.getuser())
    except (ImportError, KeyError, OSError, RequestError):
        return "unknown"


def writable(what: str, text: str) -> str:
    """The same text, which every database can keep.

    Raises:
        RequestError: it holds what is no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"The {what} {text!r} cannot be written as UTF-8.") from None
    if "\0" in text:
        raise RequestError(f"The {what} {text!r} holds a zero byte.")
    return text
