"""Questions to the ledger's tables within one transaction, and the values that go into them."""

from __future__ import annotations

import getpass
import hashlib
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypeAlias

from sqlalchemy import Connection, TableClause, func, insert, select

from emendo.errors import RequestError, StorageError
from emendo.ledger import tables
from emendo.ledger.rows import Entry, Operation

State: TypeAlias = int | str
"""An operation's number, as such or as text; a tag's name; or ``"head"``."""


def head(connection: Connection) -> Operation:
    """The latest operation.

    Raises:
        StorageError: there is none, not even the beginning.
    """
    newest = select(tables.operations).order_by(tables.operations.c.id.desc()).limit(1)
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
        named = select(tables.tags.c.operation).where(tables.tags.c.name == state)
        number = connection.scalar(named)
    if number is None:
        names = ", ".join(connection.scalars(select(tables.tags.c.name).order_by(tables.tags.c.name)))
        raise RequestError(f"There is no tag {state!r}; the tags are: {names or 'none'}.")
    row = connection.execute(select(tables.operations).where(tables.operations.c.id == number)).first()
    if row is None:
        raise RequestError(f"There is no operation {number}; the latest is {head(connection).id}.")
    return Operation(*row)


def entry(connection: Connection, id: int) -> Entry:
    """What is known about an edit.

    Raises:
        RequestError: there is none of that number.
    """
    row = connection.execute(select(tables.edits).where(tables.edits.c.id == id)).first()
    if row is None:
        known = next_id(connection, tables.edits) - 1
        raise RequestError(
            f"There is no edit {id}; {f'the last is {known}' if known else 'there are none yet'}."
        )
    return Entry(*row)


def data(connection: Connection, digest: str) -> bytes:
    """The bytes kept under a digest; none if they are lost."""
    kept = select(tables.payloads.c.data).where(tables.payloads.c.digest == digest)
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
