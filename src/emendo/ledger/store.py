"""The ledger: which edits are in force in one model, and every step that led there.

The model's weights are never changed by it: the working model is its base and the ledger's active edits, composed when
it is loaded. One transaction is one step, and nothing is ever erased; whoever is killed on the way leaves the state
before the step or the state after it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Self, TypedDict, Unpack

from sqlalchemy import Connection, insert, select

from emendo.errors import ConflictError, MismatchError, RequestError, StorageError
from emendo.ledger import _migrations as migrations
from emendo.ledger import _schema as queries
from emendo.ledger import _schema as tables
from emendo.ledger import _steps as steps
from emendo.ledger._database import Database, Where
from emendo.ledger._reading import Reading
from emendo.ledger._schema import Check, NewEntry, Operation, State, Tag

__all__ = ["How", "Ledger", "State"]


class How(TypedDict, total=False):
    """What goes with any step.

    Attributes:
        parent: the operation that the step was decided upon; None means whichever is the latest.
        by: who does it; None means the user of this process.
        note: why.
        forced: whether the guard refused it.
        health: the guard's figures, as JSON values.
    """

    parent: int | None
    by: str | None
    note: str
    forced: bool
    health: Mapping[str, Any] | None


class Ledger(Reading):
    """The ledger of one model. Safe to use from several processes at once; holds no connection between calls.

    Every method raises :class:`StorageError` when the database cannot be reached, written or understood. Those that
    take a step take the keywords of :class:`How`, and raise :class:`ConflictError` when ``parent`` is given and no
    longer the latest operation.
    """

    @classmethod
    def create(cls, where: Where, fingerprint: str, model: str) -> Self:
        """Begin a ledger.

        Args:
            where: a folder on a local disk, which then holds ``ledger.sqlite``, or an SQLAlchemy URL such as
                ``postgresql://user@host/database``.
            fingerprint: of the model.
            model: the name it is loaded by.

        Raises:
            StorageError: there is one already, or it cannot be written there.
        """
        database = Database(where, create=True)

        def first(connection: Connection) -> None:
            if (missing := migrations.missing(connection)) is None:
                migrations.begin(connection)
                missing = list(migrations.MIGRATIONS)
            for migration in missing:
                migrations.run(migration, connection)
            if (about := connection.execute(select(tables.about)).first()) is not None:
                raise StorageError(
                    f"There is a ledger of {about.model!r} at {database.name} already; open that."
                )
            now = queries.now()
            values = {"ledger": str(uuid.uuid4()), "fingerprint": fingerprint, "model": model, "created": now}
            connection.execute(insert(tables.about).values(values))
            begin = Operation(0, None, "begin", (), (), now, queries.user(), "", False, None)
            queries.put(connection, tables.operations, begin)

        database.write(first)
        return cls.open(where, fingerprint)

    @classmethod
    def open(cls, where: Where, fingerprint: str | None = None) -> Self:
        """Open a ledger; one made by an older emendo is brought up to date.

        Args:
            where: as it was given to :meth:`create`.
            fingerprint: of the model at hand; None asks nothing.

        Raises:
            MismatchError: it is another model's.
            StorageError: there is none, it is damaged, or it is from a newer emendo.
        """
        database = Database(where)
        with database.reading() as connection:
            missing = migrations.missing(connection)
        while missing:
            missing = database.write(_advance)
        about = None
        if missing is not None:
            with database.reading() as connection:
                about = connection.execute(select(tables.about)).first()
        if about is None:
            raise StorageError(f"There is no ledger at {database.name} yet.")
        ledger = cls(database, about)
        if fingerprint not in {None, ledger.fingerprint}:
            raise MismatchError(
                f"The ledger at {ledger.where} belongs to {ledger.model!r} with fingerprint {ledger.fingerprint}, but "
                f"the model at hand has fingerprint {fingerprint}. Load that model, or begin a ledger for this one."
            )
        return ledger

    def apply(self, data: bytes, about: NewEntry, **how: Unpack[How]) -> Operation:
        """Put an edit on, after those that are active.

        An edit that the ledger has seen before (the same bytes) keeps its number and what is known about it.

        Raises:
            RequestError: it is active already.
        """
        return self._step("apply", steps.apply(data, about), **how)

    def undo(self, n: int = 1, **how: Unpack[How]) -> Operation:
        """Take the last ``n`` active edits off.

        Raises:
            RequestError: so many are not active.
        """
        return self._step("undo", steps.undo(n), **how)

    def revert(self, id: int, **how: Unpack[How]) -> Operation:
        """Take one edit off, wherever it stands.

        Raises:
            RequestError: it is not active.
        """
        return self._step("revert", steps.revert(id), **how)

    def checkout(self, state: State, **how: Unpack[How]) -> Operation:
        """Have the edits that were active at an earlier state, as a new step; nothing is erased.

        Raises:
            RequestError: there is no such operation or tag.
        """
        return self._step("checkout", steps.checkout(state), **how)

    def tag(self, name: str, operation: int | None = None, *, by: str | None = None) -> Tag:
        """Name the state after an operation, by default the latest.

        Raises:
            RequestError: the name is taken or is none, or there is no such operation.
        """
        by = queries.user() if by is None else queries.writable("name", by)
        if not queries.writable("tag", name).strip() or name.isdecimal() or name == "head" or len(name) > 200:
            raise RequestError(
                f"{name!r} cannot name a tag: not a number, not 'head', and 1 to 200 characters."
            )

        def work(connection: Connection) -> Tag:
            named = select(tables.tags.c.operation).where(tables.tags.c.name == name)
            if (taken := connection.scalar(named)) is not None:
                raise RequestError(f"The tag {name!r} names operation {taken} already; take another name.")
            step = queries.operation(connection, "head" if operation is None else operation)
            tag = Tag(name, step.id, queries.now(), by)
            queries.put(connection, tables.tags, tag)
            return tag

        return self._database.write(work)

    def add_check(self, figures: Mapping[str, Any], operation: int | None = None) -> Check:
        """Keep figures measured on the whole stack, after an operation, by default the latest.

        Raises:
            RequestError: there is no such operation.
        """

        def work(connection: Connection) -> Check:
            step = queries.operation(connection, "head" if operation is None else operation)
            check = Check(queries.next_id(connection, tables.checks), step.id, queries.now(), figures)
            queries.put(connection, tables.checks, check)
            return check

        return self._database.write(work)

    def _step(
        self,
        kind: str,
        change: steps.Change,
        parent: int | None = None,
        by: str | None = None,
        note: str = "",
        forced: bool = False,
        health: Mapping[str, Any] | None = None,
    ) -> Operation:
        by = queries.user() if by is None else queries.writable("name", by)
        queries.writable("note", note)

        def work(connection: Connection) -> Operation:
            head = queries.head(connection)
            if parent not in {None, head.id}:
                raise ConflictError(
                    f"This was decided upon operation {parent}, but the latest is operation {head.id} ({head.kind} by "
                    f"{head.by}, {head.at}). Look at the ledger again, and decide anew."
                )
            edits, active = change(connection, head)
            step = Operation(
                head.id + 1, head.id, kind, edits, active, queries.now(), by, note, forced, health
            )
            queries.put(connection, tables.operations, step)
            return step

        return self._database.write(work)


def _advance(connection: Connection) -> list[migrations.Migration] | None:
    """Run the next migration; another process may have run it in the meantime."""
    if missing := migrations.missing(connection):
        migrations.run(missing.pop(0), connection)
    return missing
