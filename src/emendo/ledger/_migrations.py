"""How a ledger's database came to be: a list that only grows, each item run once in every ledger.

A migration runs in one transaction with its record (a database whose DDL cannot be rolled back, such as MySQL, keeps
that promise only in part). It is never changed once released; a new one goes to the end of :data:`MIGRATIONS`, and
``tables.py`` follows.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    column,
    inspect,
    select,
    table,
)
from sqlalchemy.dialects.mysql import LONGBLOB, LONGTEXT

from emendo.errors import StorageError


class Migration(NamedTuple):
    """A change of the tables, and the name under which it is recorded."""

    name: str
    run: Callable[[Connection], None]


def _first_tables(connection: Connection) -> None:
    text = Text().with_variant(LONGTEXT, "mysql", "mariadb")
    data = LargeBinary().with_variant(LONGBLOB, "mysql", "mariadb")
    digest, moment, name = String(64), String(40), String(200)
    tables = MetaData()

    def number(of: str, *, unique: bool = False, nullable: bool = False) -> Column[int]:
        return Column(of, Integer, ForeignKey("operations.id"), unique=unique, nullable=nullable)

    def row() -> Column[int]:
        return Column("id", Integer, primary_key=True, autoincrement=False)

    Table(
        "about",
        tables,
        Column("ledger", String(36), primary_key=True),
        Column("fingerprint", String(64), nullable=False),
        Column("model", text, nullable=False),
        Column("created", moment, nullable=False),
    )
    Table(
        "payloads",
        tables,
        Column("digest", digest, primary_key=True),
        Column("data", data, nullable=False),
    )
    Table(
        "edits",
        tables,
        row(),
        Column("digest", digest, ForeignKey("payloads.digest"), unique=True, nullable=False),
        Column("editor", text, nullable=False),
        Column("version", text, nullable=False),
        Column("requests", text, nullable=False),
        Column("made", moment, nullable=False),
        Column("upon", text, nullable=False),
        Column("bytes", Integer, nullable=False),
        Column("rank", Integer),
        Column("card", text, nullable=False),
    )
    Table(
        "operations",
        tables,
        row(),
        number(
            "parent", unique=True, nullable=True
        ),  # of two processes that step from one state, one is refused
        Column("kind", String(20), nullable=False),
        Column("edits", text, nullable=False),
        Column("active", text, nullable=False),
        Column("at", moment, nullable=False),
        Column("by", text, nullable=False),
        Column("note", text, nullable=False),
        Column("forced", Boolean, nullable=False),
        Column("health", text),
    )
    Table(
        "tags",
        tables,
        Column("name", name, primary_key=True),
        number("operation"),
        Column("at", moment, nullable=False),
        Column("by", text, nullable=False),
    )
    Table(
        "checks",
        tables,
        row(),
        number("operation"),
        Column("at", moment, nullable=False),
        Column("figures", text, nullable=False),
    )
    tables.create_all(connection, checkfirst=False)


MIGRATIONS: tuple[Migration, ...] = (Migration("0001 the first tables", _first_tables),)

_records = table("migrations", column("name", String), column("at", String))


def missing(connection: Connection) -> list[Migration] | None:
    """The migrations that this database has not seen; None if it is not a ledger's.

    Raises:
        StorageError: it has seen one that this version of emendo does not know.
    """
    if not inspect(connection).has_table(_records.name):
        return None
    seen = set(connection.scalars(select(_records.c.name)))
    if unknown := seen - {migration.name for migration in MIGRATIONS}:
        raise StorageError(
            f"This ledger is from a newer emendo (it has {min(unknown)!r}). Install that version: this one would not "
            "know what it leaves out."
        )
    return [migration for migration in MIGRATIONS if migration.name not in seen]


def begin(connection: Connection) -> None:
    """Make the table of records in a database that has no tables.

    Raises:
        StorageError: it has tables of somebody else's.
    """
    if others := inspect(connection).get_table_names():
        raise StorageError(
            f"The database holds other tables ({', '.join(sorted(others)[:3])}). Give the ledger a database of its "
            "own, or a schema: postgresql://host/database?options=-csearch_path%3Dschema."
        )
    records = Table(
        _records.name,
        MetaData(),
        Column("name", String(200), primary_key=True),
        Column("at", String(40), nullable=False),
    )
    records.create(connection, checkfirst=False)


def run(migration: Migration, connection: Connection) -> None:
    """Run one migration and record it, in the transaction at hand."""
    migration.run(connection)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    connection.execute(_records.insert().values(name=migration.name, at=now))
