"""Reading a ledger: its states, its edits and the relations between them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from sqlalchemy import select

from emendo.errors import StorageError
from emendo.ledger import _queries as queries
from emendo.ledger import _schema as schema
from emendo.ledger._database import Database
from emendo.ledger._schema import About, Check, Entry, Operation, Period, State, Tag, Values

_PAYLOADS = 64  # edits whose bytes are read at once


class Reader:
    """The read-only part of :class:`emendo.ledger.store.Ledger`.

    Attributes:
        id: a UUID; a copy of the file has the same one.
        fingerprint: fingerprint of the model.
        model: the name or folder that the model was loaded from.
        created: time, ISO 8601 in UTC.
        where: the file, or the URL without its password.
    """

    def __init__(self, database: Database, about: About) -> None:
        self._database, self.where = database, database.name
        self.id, self.fingerprint = about.ledger, about.fingerprint
        self.model, self.created = about.model, about.created

    def __repr__(self) -> str:
        return f"Ledger({self.where!r}, model={self.model!r})"

    def belongs_to(self, fingerprint: str) -> bool:
        """Whether a model of this fingerprint is the one of the ledger."""
        from emendo.models._fingerprint import same_model  # here, because it imports torch

        return fingerprint == self.fingerprint or same_model(fingerprint, self.fingerprint)

    # ------------------------------------------------------------------------------------------------ states

    @property
    def head(self) -> Operation:
        """The latest operation."""
        return self.operation("head")

    @property
    def active(self) -> tuple[Entry, ...]:
        """The active edits, in the order in which they were applied."""
        return self.entries(self.head.active)

    def operation(self, state: State) -> Operation:
        """The operation of that number, the one that a tag names, or the ``"head"``.

        Raises:
            RequestError: there is none.
        """
        with self._database.reading() as connection:
            return self._attached(queries.operation(connection, state))

    def scopes(self, state: State = "head") -> dict[int, Values]:
        """By number, the scopes of the edits that are in the memory in a state, in the order of their application.

        Raises:
            RequestError: there is no such operation or tag.
        """
        with self._database.reading() as connection:
            return queries.scopes(connection, queries.operation(connection, state).id)

    @property
    def has_chat_edits(self) -> bool:
        """Whether an active edit was made from prompts in a chat template."""
        with self._database.reading() as connection:
            return queries.has_chat_edits(connection)

    def log(self, limit: int | None = None) -> list[Operation]:
        """The operations, the latest first; at most ``limit``, without it all."""
        newest = select(schema.operations).order_by(schema.operations.c.id.desc())
        if limit is not None:
            newest = newest.limit(max(0, min(limit, 2**31 - 1)))
        with self._database.reading() as connection:
            found = [Operation(*row) for row in connection.execute(newest)]

        @cache
        def periods() -> list[Period]:
            with self._database.reading() as connection:
                return queries.periods_between(connection, found[-1].id, found[0].id)

        def active(operation: int) -> tuple[int, ...]:
            return tuple(period.edit for period in periods() if period.covers(operation))

        return [replace(operation, read_active=active) for operation in found]

    def operations_of(self, id: int) -> list[Operation]:
        """The operations that activated or deactivated an edit, the earliest first.

        Raises:
            RequestError: the ledger has no edit of that number.
        """
        with self._database.reading() as connection:
            queries.entry(connection, id)
            periods = queries.periods_of(connection, id)
            numbers = {n for period in periods for n in (period.since, period.until) if n is not None}
            found = [self._attached(queries.operation(connection, n)) for n in sorted(numbers)]
        return [step for step in found if id in step.edits]

    def diff(self, a: State, b: State) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """The edits active in state ``b`` but not in ``a``, and those active in ``a`` but not in ``b``.

        Raises:
            RequestError: there is no such operation or tag.
        """
        before, after = self.operation(a).active, self.operation(b).active
        return self.entries(queries.without(after, before)), self.entries(queries.without(before, after))

    def tags(self) -> list[Tag]:
        """The tags, in the order of their operations."""
        c = schema.tags.c
        with self._database.reading() as connection:
            rows = connection.execute(select(schema.tags).order_by(c.operation, c.at, c.name))
            return [Tag(*row) for row in rows]

    def checks(self) -> list[Check]:
        """The checks, the earliest first."""
        with self._database.reading() as connection:
            rows = connection.execute(select(schema.checks).order_by(schema.checks.c.id))
            return [Check(*row) for row in rows]

    # ------------------------------------------------------------------------------------------------- edits

    def entry(self, id: int) -> Entry:
        """The description of an edit.

        Raises:
            RequestError: the ledger has no edit of that number.
        """
        with self._database.reading() as connection:
            return queries.entry(connection, id)

    def entries(self, ids: Iterable[int] | None = None) -> tuple[Entry, ...]:
        """The descriptions of the edits of the given numbers, in their order; without numbers those of all edits.

        Raises:
            StorageError: the ledger has no edit of one of the numbers.
        """
        with self._database.reading() as connection:
            if ids is None:
                rows = connection.execute(select(schema.edits).order_by(schema.edits.c.id))
                return tuple(Entry(*row) for row in rows)
            wanted = list(ids)
            found = queries.entries(connection, wanted)
        if lost := queries.without(wanted, found):
            raise StorageError(f"The ledger at {self.where} is damaged: edit {lost[0]} is missing.")
        return tuple(found[id] for id in wanted)

    def load(self, id: int) -> bytes:
        """The bytes of an edit, checked against its digest.

        Raises:
            RequestError: the ledger has no edit of that number.
            StorageError: they are damaged.
        """
        self.entry(id)
        return next(data for _, data in self.load_many([id]))

    def load_many(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Numbers and bytes of edits in the given order, each checked against its digest; read in batches.

        Raises:
            StorageError: the ledger has no edit of one of the numbers, or its bytes are damaged.
        """
        with self._database.reading() as connection:
            for id, digest, data in queries.payloads(connection, ids, _PAYLOADS):
                if hashlib.sha256(data).hexdigest() != digest:
                    raise StorageError(
                        f"Edit {id} is damaged in the ledger at {self.where}: its bytes do not match their digest. "
                        f"Take it off (revert {id}) and apply it again from its file, which restores it."
                    )
                yield id, data

    def digests(self, ids: Sequence[int]) -> list[str]:
        """The digests of edits, in the given order.

        Raises:
            StorageError: the ledger has no edit of one of the numbers.
        """
        with self._database.reading() as connection:
            return queries.digests(connection, ids)

    def later_upon(self, id: int) -> tuple[Entry, ...]:
        """The active edits that were computed while this one was active: taking it off may weaken them.

        Raises:
            RequestError: the ledger has no edit of that number.
        """
        with self._database.reading() as connection:
            digest = queries.entry(connection, id).digest
            periods = queries.periods_of(connection, id)

        def is_upon(reference: str) -> bool:
            operation = self._operation_of(reference)
            return reference == digest or (
                operation is not None and any(period.covers(operation) for period in periods)
            )

        return tuple(entry for entry in self.active if any(map(is_upon, entry.upon)))

    def made_upon(self, entry: Entry) -> list[int]:
        """Numbers of the edits that were active while an edit was computed, as far as this ledger knows them."""
        found: set[int] = set()
        with self._database.reading() as connection:
            for reference in entry.upon:
                if (operation := self._operation_of(reference)) is not None:
                    found |= set(queries.active(connection, operation))
            found |= set(queries.ids(connection, entry.upon))
        return sorted(found)

    def _operation_of(self, reference: str) -> int | None:
        """The operation of a reference to a state of this ledger; None for the digest of an edit."""
        ledger, _, operation = reference.partition("@")
        return int(operation) if ledger == self.id and operation.isdecimal() and len(operation) < 10 else None

    def with_same_prompts(
        self, requests: Sequence[Mapping[str, Any]], state: State = "head"
    ) -> tuple[Entry, ...]:
        """The edits active in a state that have a prompt in common with the requests.

        Prompts are compared without regard to case, spacing and Unicode form.
        """
        prompts = [str(request.get("prompt", "")) for request in requests]
        with self._database.reading() as connection:
            operation = queries.operation(connection, state).id
            found = queries.with_prompts(connection, prompts, operation)
            return tuple(queries.entries(connection, found).values())

    def _attached(self, step: Operation) -> Operation:
        """The operation, able to read the edits that were active after it."""
        return replace(step, read_active=self._active)

    def _active(self, operation: int) -> tuple[int, ...]:
        with self._database.reading() as connection:
            return queries.active(connection, operation)
