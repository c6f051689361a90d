"""The one place that knows what kind of database a ledger is in: how to reach it, lock it, and read its complaints."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from emendo.errors import ConflictError, RequestError, StorageError

T = TypeVar("T")
Where: TypeAlias = str | Path

FILE = "ledger.sqlite"
_WAIT = 30.0  # seconds for another process to finish its step
_ATTEMPTS = 100
_LOCK = 0x656D656E646F  # "emendo": PostgreSQL's advisory lock of whoever writes
_WORDS = (  # part of a database's complaint, in lower case -> what it means here
    ("readonly", "It cannot be written: the file or its folder is read-only"),
    ("read-only", "It cannot be written: the database is read-only"),
    ("locked", f"Another process has held it for {_WAIT:.0f} seconds; try again when that is done"),
    ("is full", "The disk is full; the ledger is as it was before this step"),
    ("malformed", "The file is damaged; put back a copy of it"),
    ("not a database", "The file is no ledger, or it is damaged"),
    ("unable to open", "The file cannot be opened: look at the rights of its folder"),
    (
        "password",
        "The database lets nobody in without a password; ledger.json keeps none: give the URL with it",
    ),
)


def locate(where: Where) -> URL:
    """Where a ledger is, as a URL in one form: SQLite's path absolute, PostgreSQL's driver named.

    Args:
        where: a folder, or the text of an SQLAlchemy URL.

    Raises:
        RequestError: it is no URL, or one of a database that keeps nothing.
    """
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(Path(where).expanduser().resolve() / FILE))
    try:
        url = make_url(where)
    except (ArgumentError, ValueError) as error:
        raise RequestError(
            "The URL of the ledger is not one such as postgresql://user@host/database."
        ) from error
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite":
        if url.database in {None, "", ":memory:"} or str(url.database).startswith("file:"):
            raise RequestError(
                "A ledger in SQLite needs a file: give a folder, or sqlite:///path/of/the/file."
            )
        url = URL.create("sqlite", database=str(Path(str(url.database)).expanduser().resolve()))
    return url


def public(url: URL) -> str:
    """The URL as it may be shown and written down: without its password."""
    query = {key: value for key, value in url.query.items() if "password" not in key.lower()}
    return URL.create(
        url.drivername, url.username, host=url.host, port=url.port, database=url.database, query=query
    ).render_as_string()


def file_of(url: URL) -> Path | None:
    """SQLite's file; None for a database behind a server."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


class Database:
    """Connections for one transaction each: nothing is held between steps, nor across a fork.

    Args:
        where: a folder, or the text of an SQLAlchemy URL.
        create: make SQLite's file if it is not there.

    Raises:
        RequestError: the URL is none, or its driver is not installed.
        StorageError: SQLite's file is not there, or cannot be made.
    """

    def __init__(self, where: Where, *, create: bool = False) -> None:
        url = locate(where)
        self.name = public(url)
        if (file := file_of(url)) is not None:
            self.name = str(file)
            _look(file, create)
            self._engine = _sqlite(url, partial(_connect, file, create))
        else:
            self._engine = _server(url, self.name)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction to look around in.

        Raises:
            StorageError: the database cannot be reached or is damaged.
        """
        with self._spoken(), self._engine.connect() as connection, connection.begin():
            yield connection

    def write(self, work: Callable[[Connection], T]) -> T:
        """Do the work in a transaction that is committed as a whole or leaves nothing, and give its result.

        SQLite and PostgreSQL let one process write at a time. Elsewhere the rows' keys tell that another process was
        faster, and the work is done again on what that one has left.

        Raises:
            ConflictError: others were faster each time.
            StorageError: the database cannot be reached or written, or is damaged.
        """
        for _ in range(_ATTEMPTS):
            with suppress(IntegrityError), self._spoken(), self._engine.connect() as connection:
                connection = connection.execution_options(emendo_writes=True)
                with connection.begin():
                    result = work(connection)
                return result
        raise ConflictError(
            f"The ledger at {self.name}: other processes were faster {_ATTEMPTS} times; try again."
        )

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            said = str(error.orig).strip()
            word = next((word for part, word in _WORDS if part in said.lower()), "The database refused")
            raise StorageError(f"The ledger at {self.name}: {word}. ({said})") from error


def _look(file: Path, create: bool) -> None:
    """See that SQLite's file is there, or that it can be made."""
    if file.is_file():
        return
    if not create:
        raise StorageError(f"There is no ledger at {file}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"No ledger can be made at {file}: {error}. Name another place: a folder, or a database's URL."
        ) from error


def _connect(file: Path, create: bool) -> sqlite3.Connection:
    mode = "rwc" if create else "rw"
    if not create and not os.access(file.parent, os.W_OK):
        # SQLite would make files beside it even to read; without steps left to recover it needs none.
        log = file.with_name(f"{file.name}-wal")
        mode = "ro" if log.exists() and log.stat().st_size else "ro&immutable=1"
    connection = sqlite3.connect(f"{file.as_uri()}?mode={mode}", _WAIT, isolation_level=None, uri=True)
    try:
        if create:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a step that was reported survives a power cut
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _sqlite(url: URL, connect: Any) -> Engine:
    engine = create_engine(url, creator=connect, poolclass=NullPool, hide_parameters=True)

    @event.listens_for(engine, "begin")  # the driver's own transactions leave out DDL and lock too late
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("emendo_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _server(url: URL, name: str) -> Engine:
    try:
        engine = create_engine(url, poolclass=NullPool, hide_parameters=True)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise RequestError(
            f"{name} needs a driver that is not installed ({error}). For PostgreSQL: pip install 'emendo[postgres]'."
        ) from error

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get("emendo_writes") and engine.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")

    return engine
