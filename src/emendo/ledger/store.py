"""The ledger of a model: which edits are active, and every step that led there.

The ledger never changes the model's weights: the working model is the base model with the active edits, which are put
together when the model is loaded. One transaction is one step, and nothing is erased. A process that is killed during
a step leaves the state before it or the state after it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self, TypedDict, Unpack

from sqlalchemy import Connection, select

from emendo.errors import ConflictError, MismatchError, RequestError, StorageError
from emendo.ledger import _migrations as migrations
from emendo.ledger import _queries as queries
from emendo.ledger import _schema as schema
from emendo.ledger._database import Database, ReadOnlyError, Where
from emendo.ledger._queries import Plan
from emendo.ledger._reading import Reader
from emendo.ledger._schema import About, Check, NewEntry, Operation, State, Tag, Values

_OPTIMISTIC = 3  # times that a step is checked without holding up other writers


class StepOptions(TypedDict, total=False):
    """Options of every step.

    Attributes:
        parent: the operation on which the step is based; None stands for the latest one.
        by: name of the user; None stands for the user of this process.
        note: a comment.
        forced: whether the guard refused the edit.
        health: the guard's figures, as JSON values.
    """

    parent: int | None
    by: str | None
    note: str
    forced: bool
    health: Mapping[str, Any] | None


class Ledger(Reader):
    """The ledger of one model. Several processes may use it at once; it holds no connection between calls.

    Every method raises :class:`StorageError` when the database cannot be reached, written or understood. The methods
    that take a step accept :class:`StepOptions`, and raise :class:`ConflictError` when ``parent`` is given and is not
    the latest operation.
    """

    @classmethod
    def create(cls, where: Where, fingerprint: str, model: str) -> Self:
        """Create a ledger.

        Args:
            where: a folder on a local disk, which will hold ``ledger.sqlite``, or an SQLAlchemy URL such as
                ``postgresql://user@host/database``.
            fingerprint: fingerprint of the model.
            model: the name or folder that it is loaded from.

        Raises:
            RequestError: it is not a URL of a supported database.
            StorageError: there is a ledger already, or it cannot be written there.
        """
        database = Database(where, create=True)

        def first(connection: Connection) -> None:
            if (missing := migrations.missing(connection)) is None:
                migrations.begin(connection)
                missing = list(migrations.MIGRATIONS)
            for migration in missing:
                migrations.run(migration, connection)
            if (row := connection.execute(select(schema.about)).first()) is not None:
                raise StorageError(f"There is a ledger of {row.model!r} at {database.name} already; open it.")
            now = queries.now()
            connection.execute(About(str(uuid.uuid4()), fingerprint, model, now).insert())
            beginning = Operation(0, None, "begin", (), 0, now, queries.user(), "", False, None)
            connection.execute(beginning.insert())

        database.write(first)
        return cls.open(where, fingerprint)

    @classmethod
    def open(cls, where: Where, fingerprint: str | None = None) -> Self:
        """Open a ledger; one of an older emendo is converted first, or a copy of it where its file is read-only.

        Args:
            where: as in :meth:`create`.
            fingerprint: fingerprint of the model; None skips the comparison.

        Raises:
            MismatchError: it belongs to another model.
            StorageError: it does not exist, is damaged, or is from a newer emendo.
        """
        database = Database(where)
        with database.reading() as connection:
            missing = migrations.missing(connection)
        if missing:
            try:
                _convert(database)
            except ReadOnlyError:
                database = database.converted_copy(_convert)
        row = None
        if missing is not None:
            with database.reading() as connection:
                row = connection.execute(select(schema.about)).first()
        if row is None:
            raise StorageError(f"There is no ledger at {database.name} yet.")
        ledger = cls(database, About(*row))
        if fingerprint is not None and not ledger.belongs_to(fingerprint):
            raise MismatchError(
                f"The ledger at {ledger.where} belongs to {ledger.model!r} with fingerprint {ledger.fingerprint}, but "
                f"the model at hand has fingerprint {fingerprint}. Load that model, or create a ledger for this one."
            )
        return ledger

    def apply(
        self, data: bytes, about: NewEntry, scope: Values | None = None, **options: Unpack[StepOptions]
    ) -> Operation:
        """Activate an edit, after those that are active.

        An edit that the ledger knows (the same bytes) keeps its number and description.

        Args:
            data: the bytes of the edit.
            about: its description.
            scope: puts it into the memory (:class:`emendo.ledger._schema.Period`) instead of the weights.
            options: see :class:`StepOptions`.

        Raises:
            RequestError: it is active already.
        """
        return self._step("apply", queries.plan_apply(data, about, scope), **options)

    def apply_checked(
        self,
        data: bytes,
        about: NewEntry,
        check: Callable[[Operation], StepOptions],
        scope: Values | None = None,
        **options: Unpack[StepOptions],
    ) -> Operation:
        """Check an edit on the latest state, and activate it in that very state.

        The check may take long, so it does not hold up other processes at first. If they take steps in the meantime it
        is repeated, and after a few times it runs while they wait: a slow check is never refused for its slowness.

        Args:
            data: the bytes of the edit.
            about: its description.
            check: is given the latest operation and returns further options of the step; it raises to refuse the edit.
            scope: as in :meth:`apply`.
            options: see :class:`StepOptions`.

        Raises:
            RequestError: it is active already.
        """
        plan = queries.plan_apply(data, about, scope)
        for _ in range(_OPTIMISTIC):
            head = self.head
            found: StepOptions = {**options, **check(head), "parent": head.id}
            with suppress(ConflictError):
                return self._step("apply", plan, **found)
        return self._step("apply", plan, check, **options)

    def undo(self, n: int = 1, **options: Unpack[StepOptions]) -> Operation:
        """Take the last ``n`` active edits off.

        Raises:
            RequestError: fewer than ``n`` are active.
        """
        return self._step("undo", queries.plan_undo(n), **options)

    def revert(self, id: int, **options: Unpack[StepOptions]) -> Operation:
        """Take one edit off, at any position.

        Raises:
            RequestError: it is not active.
        """
        return self._step("revert", queries.plan_revert(id), **options)

    def checkout(self, state: State, **options: Unpack[StepOptions]) -> Operation:
        """Return to the edits that were active in an earlier state, as a new step; nothing is erased.

        Raises:
            RequestError: there is no such operation or tag.
        """
        return self._step("checkout", queries.plan_checkout(state), **options)

    def tag(self, name: str, operation: int | None = None, *, by: str | None = None) -> Tag:
        """Name the state after an operation, by default the latest.

        Raises:
            RequestError: the name is in use or not allowed, or there is no such operation.
        """
        by = queries.user() if by is None else queries.storable("name", by)
        if not queries.storable("tag", name).strip() or name.isdecimal() or name == "head" or len(name) > 200:
            raise RequestError(
                f"{name!r} cannot be a tag: not a number, not 'head', and 1 to 200 characters."
            )

        def work(connection: Connection) -> Tag:
            named = select(schema.tags.c.operation).where(schema.tags.c.name == name)
            if (taken := connection.scalar(named)) is not None:
                raise RequestError(f"The tag {name!r} names operation {taken} already; choose another name.")
            step = queries.operation(connection, "head" if operation is None else operation)
            tag = Tag(name, step.id, queries.now(), by)
            connection.execute(tag.insert())
            return tag

        return self._database.write(work)

    def add_check(self, figures: Mapping[str, Any], operation: int | None = None) -> Check:
        """Store figures of all active edits together, measured after an operation, by default the latest.

        Raises:
            RequestError: there is no such operation.
        """

        def work(connection: Connection) -> Check:
            step = queries.operation(connection, "head" if operation is None else operation)
            check = Check(queries.next_id(connection, schema.checks), step.id, queries.now(), figures)
            connection.execute(check.insert())
            return check

        return self._database.write(work)

    def _step(
        self,
        kind: str,
        plan: Plan,
        check: Callable[[Operation], StepOptions] | None = None,
        **options: Unpack[StepOptions],
    ) -> Operation:
        by, parent = options.get("by"), options.get("parent")
        by = queries.user() if by is None else queries.storable("name", by)
        note = queries.storable("note", options.get("note", ""))

        def work(connection: Connection) -> Operation:
            head = queries.head(connection)
            if parent not in {None, head.id}:
                raise ConflictError(
                    f"This step is based on operation {parent}, but the latest is operation {head.id} ({head.kind} by "
                    f"{head.by}, {head.at}). Look at the ledger again, and decide anew."
                )
            found: StepOptions = {**options}
            if check is not None:
                found |= check(self._attached(head))
            change = plan(connection, head)
            count = head.active_count + len(change.on) - len(change.off)
            forced, health = bool(found.get("forced", False)), found.get("health")
            step = Operation(
                head.id + 1, head.id, kind, change.edits, count, queries.now(), by, note, forced, health
            )
            queries.record(connection, change, step)
            return step

        return self._attached(self._database.write(work))


def _convert(database: Database) -> None:
    while database.write(_migrate_once):
        pass


def _migrate_once(connection: Connection) -> list[migrations.Migration] | None:
    """Run the next migration, and return those that remain; another process may have run it in the meantime."""
    if missing := migrations.missing(connection):
        migrations.run(missing.pop(0), connection)
    return missing
