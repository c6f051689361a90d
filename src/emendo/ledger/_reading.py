"""Looking into a ledger; every question sees one state, and takes no lock that another process would wait for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row, select

from emendo.errors import StorageError
from emendo.ledger import _schema as queries
from emendo.ledger import _schema as tables
from emendo.ledger import _steps as steps
from emendo.ledger._database import Database
from emendo.ledger._schema import Check, Entry, Operation, State, Tag


class Reading:
    """What can be asked of a ledger.

    Attributes:
        id: a name of its own, a UUID; a copy of the file has the same.
        fingerprint: of the model whose edits these are.
        model: the name that model was loaded by.
        created: when, ISO 8601 in UTC.
        where: its file, or its URL without a password.
    """

    def __init__(self, database: Database, about: Row[Any]) -> None:
        self._database, self.where = database, database.name
        self.id, self.fingerprint, self.model, self.created = (str(value) for value in about)

    def __repr__(self) -> str:
        return f"Ledger({self.where!r}, model={self.model!r})"

    @property
    def head(self) -> Operation:
        """The latest operation."""
        with self._database.reading() as connection:
            return queries.head(connection)

    @property
    def active(self) -> tuple[Entry, ...]:
        """The edits in force, in the order in which they were put on."""
        return self.entries(self.head.active)

    def log(self, limit: int | None = None) -> list[Operation]:
        """The operations, the latest first, at most so many."""
        asked = select(tables.operations).order_by(tables.operations.c.id.desc()).limit(limit)
        with self._database.reading() as connection:
            return [Operation(*row) for row in connection.execute(asked)]

    def operation(self, state: State) -> Operation:
        """The operation of that number, the one that a tag names, or the ``"head"``.

        Raises:
            RequestError: there is none.
        """
        with self._database.reading() as connection:
            return queries.operation(connection, state)

    def entry(self, id: int) -> Entry:
        """What is known about an edit.

        Raises:
            RequestError: the ledger has none of that number.
        """
        with self._database.reading() as connection:
            return queries.entry(connection, id)

    def entries(self, ids: Iterable[int] | None = None) -> tuple[Entry, ...]:
        """All edits that the ledger has seen, or those of the given numbers in their order."""
        with self._database.reading() as connection:
            rows = connection.execute(select(tables.edits).order_by(tables.edits.c.id))
            found = {row.id: Entry(*row) for row in rows}
        try:
            return tuple(found.values() if ids is None else (found[id] for id in ids))
        except KeyError as error:
            raise StorageError(f"The ledger at {self.where} is damaged: edit {error} is not in it.") from None

    def load(self, id: int) -> bytes:
        """The bytes of an edit, checked against its digest.

        Raises:
            RequestError: the ledger has no such edit.
            StorageError: they are damaged.
        """
        with self._database.reading() as connection:
            digest = queries.entry(connection, id).digest
            data = queries.data(connection, digest)
        if queries.digest(data) != digest:
            raise StorageError(
                f"Edit {id} is damaged in the ledger at {self.where}: its bytes do not match their digest. Take it off "
                f"(revert {id}) and apply it again from its file, which mends it."
            )
        return data

    def later_upon(self, id: int) -> tuple[Entry, ...]:
        """The active edits that were computed while this one was in the model: taking it off may weaken them.

        Raises:
            RequestError: the ledger has no such edit.
        """
        digest = self.entry(id).digest
        return tuple(entry for entry in self.active if digest in entry.upon)

    def diff(self, a: State, b: State) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """The edits that ``b`` has and ``a`` has not, and those that ``a`` has and ``b`` has not.

        Raises:
            RequestError: there is no such operation or tag.
        """
        before, after = self.operation(a).active, self.operation(b).active
        return self.entries(steps.without(after, before)), self.entries(steps.without(before, after))

    def tags(self) -> list[Tag]:
        """The tags, in the order of their operations."""
        order = tables.tags.c.operation, tables.tags.c.at, tables.tags.c.name
        with self._database.reading() as connection:
            return [Tag(*row) for row in connection.execute(select(tables.tags).order_by(*order))]

    def checks(self) -> list[Check]:
        """The checks, the earliest first."""
        with self._database.reading() as connection:
            return [
                Check(*row) for row in connection.execute(select(tables.checks).order_by(tables.checks.c.id))
            ]
