"""The migrations that create and change the tables of a ledger: an append-only list, each run once in every ledger.

A migration runs in one transaction together with its record (in a database that cannot roll back DDL, such as MySQL,
this holds only in part). It is never changed after its release: it does not use the classes of
:mod:`emendo.ledger._schema`, which describe the tables after the last migration. A new one goes to the end of
:data:`MIGRATIONS`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Index,
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
    text,
)
from sqlalchemy.dialects.mysql import LONGBLOB, LONGTEXT

from emendo.errors import StorageError


class Migration(NamedTuple):
    """A change of the tables, and the name by which it is recorded."""

    name: str
    run: Callable[[Connection], None]


def _first_tables(connection: Connection) -> None:
    long_text = Text().with_variant(LONGTEXT, "mysql", "mariadb")
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
        Column("model", long_text, nullable=False),
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
        Column("editor", long_text, nullable=False),
        Column("version", long_text, nullable=False),
        Column("requests", long_text, nullable=False),
        Column("made", moment, nullable=False),
        Column("upon", long_text, nullable=False),
        Column("bytes", Integer, nullable=False),
        Column("rank", Integer),
        Column("card", long_text, nullable=False),
    )
    Table(
        "operations",
        tables,
        row(),
        number(
            "parent", unique=True, nullable=True
        ),  # of two processes that step from one state, one is refused
        Column("kind", String(20), nullable=False),
        Column("edits", long_text, nullable=False),
        Column("active", long_text, nullable=False),
        Column("at", moment, nullable=False),
        Column("by", long_text, nullable=False),
        Column("note", long_text, nullable=False),
        Column("forced", Boolean, nullable=False),
        Column("health", long_text),
    )
    Table(
        "tags",
        tables,
        Column("name", name, primary_key=True),
        number("operation"),
        Column("at", moment, nullable=False),
        Column("by", long_text, nullable=False),
    )
    Table(
        "checks",
        tables,
        row(),
        number("operation"),
        Column("at", moment, nullable=False),
        Column("figures", long_text, nullable=False),
    )
    tables.create_all(connection, checkfirst=False)


def _periods_instead_of_lists(connection: Connection) -> None:
    """Store when each edit was active, once, instead of the list of all active edits with every operation."""
    tables = MetaData()
    for name in ("edits", "operations"):
        Table(name, tables, Column("id", Integer, primary_key=True))
    periods = Table(
        "periods",
        tables,
        Column("edit", Integer, ForeignKey("edits.id"), primary_key=True, autoincrement=False),
        Column("position", Integer, nullable=False),
        Column("since", Integer, ForeignKey("operations.id"), primary_key=True, autoincrement=False),
        Column("until", Integer, ForeignKey("operations.id")),
        Index("periods_until", "until", "position"),
    )
    prompts = Table(
        "prompts",
        tables,
        Column("edit", Integer, ForeignKey("edits.id"), primary_key=True, autoincrement=False),
        Column("digest", String(32), primary_key=True),
        Index("prompts_digest", "digest"),
    )
    tables.create_all(connection, tables=[periods, prompts], checkfirst=False)
    connection.execute(text("ALTER TABLE operations ADD COLUMN active_count INTEGER NOT NULL DEFAULT 0"))
    connection.execute(text("ALTER TABLE edits ADD COLUMN chat BOOLEAN NOT NULL DEFAULT FALSE"))
    found, counts = _periods(connection)
    if found:
        connection.execute(periods.insert(), found)
        changed = text("UPDATE operations SET active_count = :active_count WHERE id = :id")
        connection.execute(changed, counts)
    for id, requests, digest in connection.execute(text("SELECT id, requests, digest FROM edits")).fetchall():
        keys = {_prompt_digest(request) for request in _json(requests, list)}
        if keys:
            connection.execute(prompts.insert(), [{"edit": id, "digest": key} for key in keys])
        data = connection.scalar(text("SELECT data FROM payloads WHERE digest = :digest"), {"digest": digest})
        if _made_in_chat(data):
            connection.execute(text("UPDATE edits SET chat = TRUE WHERE id = :id"), {"id": id})
    connection.execute(text("ALTER TABLE operations DROP COLUMN active"))


def _scopes(connection: Connection) -> None:
    """Edits may be in the memory, each with its scope, instead of in the weights."""
    connection.execute(text("ALTER TABLE periods ADD COLUMN scope TEXT"))


def _periods(connection: Connection) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
    """Rows of ``periods``, and the number of active edits for each operation, from the lists of the operations.

    An edit's position is the operation that applied it; a checkout gives edits the positions of the state it goes to.
    """
    rows: list[dict[str, Any]] = []
    counts: list[dict[str, int]] = []
    open_rows: dict[int, dict[str, Any]] = {}
    states: dict[str, int] = {}  # the stored list -> the last operation with it

    def places(operation: int) -> dict[int, int]:
        return {
            row["edit"]: row["position"]
            for row in rows
            if row["since"] <= operation and (row["until"] is None or row["until"] > operation)
        }

    known = set(connection.scalars(text("SELECT id FROM edits")))
    asked = text("SELECT id, kind, active FROM operations ORDER BY id")
    for id, kind, active in connection.execute(asked).fetchall():
        ids = _json(active, list)
        if not all(isinstance(edit, int) and edit in known for edit in ids):
            raise StorageError(f"The ledger is damaged: operation {id} has edits that are missing.")
        earlier = places(states[active]) if kind == "checkout" and active in states else {}
        wanted = {
            edit: earlier.get(edit, open_rows[edit]["position"] if edit in open_rows else id) for edit in ids
        }
        for edit, row in list(open_rows.items()):
            if wanted.get(edit) != row["position"]:
                row["until"] = id
                del open_rows[edit]
        for edit, position in wanted.items():
            if edit not in open_rows:
                open_rows[edit] = {"edit": edit, "position": position, "since": id, "until": None}
                rows.append(open_rows[edit])
        if sorted(set(wanted.values())) != [wanted[edit] for edit in ids]:
            raise StorageError(
                f"The ledger is damaged: the active edits of operation {id} do not follow from those before it. "
                "Restore a copy of it."
            )
        states[active] = id
        counts.append({"id": id, "active_count": len(ids)})
    return rows, counts


def _json(value: Any, kind: type) -> Any:
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"The ledger is damaged: {value!r:.80} is not JSON ({error!s:.80}).") from error
    if not isinstance(found, kind):
        raise StorageError(f"The ledger is damaged: {value!r:.80} is not a JSON {kind.__name__}.")
    return found


def _prompt_digest(request: Any) -> str:
    prompt = str(request.get("prompt", "")) if isinstance(request, dict) else ""
    plain = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()[:32]


def _made_in_chat(data: Any) -> bool:
    """Whether the bytes of an edit say that its prompts were in a chat template; False where they are damaged."""
    try:
        length = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["emendo"])
        return bool(head["origin"].get("chat", False))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False


MIGRATIONS: tuple[Migration, ...] = (
    Migration("0001 the first tables", _first_tables),
    Migration("0002 periods instead of lists", _periods_instead_of_lists),
    Migration("0003 scopes of edits in the memory", _scopes),
)

_records = table("migrations", column("name", String), column("at", String))


def missing(connection: Connection) -> list[Migration] | None:
    """The migrations that were not run in this database; None if it is not a ledger.

    Raises:
        StorageError: one was run that this version of emendo does not know.
    """
    if not inspect(connection).has_table(_records.name):
        return None
    seen = set(connection.scalars(select(_records.c.name)))
    if unknown := seen - {migration.name for migration in MIGRATIONS}:
        raise StorageError(
            f"This ledger is from a newer emendo (it has {min(unknown)!r}). Install that version to use it."
        )
    return [migration for migration in MIGRATIONS if migration.name not in seen]


def begin(connection: Connection) -> None:
    """Create the table of migrations in a database without tables.

    Raises:
        StorageError: it has other tables.
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
    """Run one migration and record it, in the current transaction."""
    migration.run(connection)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    connection.execute(_records.insert().values(name=migration.name, at=now))
