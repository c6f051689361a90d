"""The database of a ledger: its address, its transactions and locks, and its errors in plain words.

SQLite, PostgreSQL and MySQL (or MariaDB) are supported; the rest of the package does not know which one is in use.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import URL, Connection, Engine, NullPool, Pool, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from emendo.errors import ConflictError, RequestError, StorageError

T = TypeVar("T")
Where: TypeAlias = str | Path
"""A folder, or the text of an SQLAlchemy URL."""

FILE = "ledger.sqlite"
_WAIT = 300.0  # seconds that a writer waits for the others
_ATTEMPTS = 100
_LOCK = 0x656D656E646F  # "emendo": PostgreSQL's advisory lock of the writer
_LITTLE = 1 << 20  # bytes of free space below which a disk counts as full
_SUPPORTED = {
    "sqlite": ("sqlite", "sqlite+pysqlite"),
    "postgresql": ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"),
    "mysql": ("mysql", "mysql+pymysql", "mysql+mysqldb", "mysql+mysqlconnector"),
    "mariadb": ("mariadb", "mariadb+pymysql", "mariadb+mysqldb", "mariadb+mariadbconnector"),
}
_FULL = "The disk is full; the ledger is as it was before this step. Free some space and try again"
_READ_ONLY = ("readonly", "read-only")
_MESSAGES = (  # part of a database's error message, in lower case -> the message of the StorageError
    ("readonly", "It cannot be written: the file or its folder is read-only"),
    ("read-only", "It cannot be written: the database is read-only"),
    (
        "locked",
        "Another process has locked it for {wait:.0f} seconds; try again when that process has finished",
    ),
    ("is full", _FULL),
    ("no space left", _FULL),
    (
        "disk i/o error",
        "The disk reports an error. Check the disk, and restore a copy if the file is damaged",
    ),
    ("malformed", "The file is damaged; restore a copy of it"),
    ("not a database", "The file is not a ledger, or it is damaged"),
    ("unable to open", "The file cannot be opened: check the permissions of its folder"),
    ("password", "The database asks for a password, which ledger.json does not store: give the URL with it"),
    ("connect", "The server cannot be reached: check that it is running and that the URL is right"),
)


def locate(where: Where) -> URL:
    """The location of a ledger as a URL in one form: SQLite's path absolute, PostgreSQL's driver named.

    Raises:
        RequestError: it is not a URL, its database is not supported, or it is SQLite in memory.
    """
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(_absolute(where) / FILE))
    try:
        url = make_url(where)
        backend = url.drivername.partition("+")[0]
    except (ArgumentError, ValueError) as error:
        raise RequestError(
            "The URL of the ledger is not of the form postgresql://user@host/database."
        ) from error
    if backend == "postgres":
        url, backend = url.set(drivername=url.drivername.replace("postgres", "postgresql", 1)), "postgresql"
    if url.drivername not in _SUPPORTED.get(backend, ()):
        known = ", ".join(driver for drivers in _SUPPORTED.values() for driver in drivers)
        raise RequestError(
            f"A ledger cannot be in a database of the kind {url.drivername!r}; supported are {known}."
        )
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        if url.database in {None, "", ":memory:"} or str(url.database).startswith("file:"):
            raise RequestError(
                "A ledger in SQLite needs a file: give a folder, or sqlite:///path/of/the/file."
            )
        url = URL.create("sqlite", database=str(_absolute(str(url.database))))
    return url


def _absolute(path: Where) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a loop of links, a zero byte
        raise RequestError(f"{str(path)!r} is not a path on this system: {error}.") from error


def public(url: URL) -> str:
    """The URL without its password, as it may be shown and stored."""
    query = {key: value for key, value in url.query.items() if "password" not in key.lower()}
    return URL.create(
        url.drivername, url.username, host=url.host, port=url.port, database=url.database, query=query
    ).render_as_string()


def file_of(url: URL) -> Path | None:
    """SQLite's file; None for a database on a server."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


class ReadOnlyError(StorageError):
    """The database cannot be written."""


class Database:
    """Connections for one transaction each: nothing is held between steps, nor across a fork.

    Args:
        where: a folder, or the text of an SQLAlchemy URL.
        create: create SQLite's file if it is missing.

    Raises:
        RequestError: it is not a URL of a supported database, or the driver is not installed.
        StorageError: SQLite's file is missing, or cannot be created.
    """

    def __init__(self, where: Where, *, create: bool = False) -> None:
        url = locate(where)
        self.name = public(url)
        self._file = file_of(url)
        if self._file is not None:
            self.name = str(self._file)
            _require(self._file, create)
            self._engine = _sqlite_engine(url, partial(_connect, self._file, create))
        else:
            self._engine = _server_engine(url, self.name)

    def converted_copy(self, convert: Callable[[Database], None]) -> Database:
        """A private copy of SQLite's file, converted; it can be read, and the file stays as it is.

        Args:
            convert: changes the copy.

        Raises:
            StorageError: the file cannot be read; or the database is on a server, so that nothing is copied.
        """
        if self._file is None:
            raise StorageError(
                f"The ledger at {self.name} is of an older emendo and has to be converted, but the database is "
                "read-only. Open it once as a user who may write to it: emendo log --ledger URL"
            )
        memory = sqlite3.connect(
            "", isolation_level=None, check_same_thread=False
        )  # on disk where it is large
        try:
            with closing(_connect(self._file, False)) as source:
                source.backup(memory)
        except sqlite3.Error as error:
            raise StorageError(
                f"The ledger at {self.name}: {self._message(str(error))}. ({error})"
            ) from error
        twin = copy(self)
        twin._engine = _sqlite_engine(URL.create("sqlite"), lambda: memory, StaticPool)
        convert(twin)
        memory.execute("PRAGMA query_only = ON")
        return twin

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads; it sees one state and waits for nobody.

        Raises:
            StorageError: the database cannot be reached or is damaged.
        """
        with self._errors_translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that is committed as a whole or not at all, and return its result.

        SQLite and PostgreSQL admit one writer at a time, the others wait. Elsewhere a unique key fails if another
        process was faster, and the work is run again on the new state.

        Raises:
            ConflictError: the step conflicted with other processes each time.
            StorageError: the database cannot be reached or written, or is damaged.
        """
        for _ in range(_ATTEMPTS):
            with suppress(IntegrityError), self._errors_translated(), self._engine.connect() as connection:
                connection = connection.execution_options(emendo_writes=True)
                with connection.begin():
                    result = work(connection)
                return result
        raise ConflictError(
            f"The ledger at {self.name}: other processes were faster {_ATTEMPTS} times. Try again; if it "
            "fails each time the ledger is damaged, and a copy has to be restored."
        )

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            text = str(error.orig).strip()
            kind = ReadOnlyError if any(word in text.lower() for word in _READ_ONLY) else StorageError
            raise kind(f"The ledger at {self.name}: {self._message(text)}. ({text})") from error
        except (OverflowError, UnicodeDecodeError) as error:  # a number or a text of a damaged row
            raise StorageError(
                f"The ledger at {self.name} is damaged; restore a copy of it. ({error})"
            ) from error

    def _message(self, text: str) -> str:
        lower = text.lower()
        if "disk i/o error" in lower and self._file is not None and _is_full(self._file.parent):
            return _FULL  # SQLite says so only of its own file, not of the index of its log
        found = next(
            (message for part, message in _MESSAGES if part in lower), "The database reports an error"
        )
        return found.format(wait=_WAIT)


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LITTLE
    except OSError:
        return False


def _require(file: Path, create: bool) -> None:
    """Make sure that SQLite's file exists, or that its folder does where it may be created."""
    try:
        if file.is_file():
            return
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
            return
    except (OSError, ValueError) as error:
        raise StorageError(
            f"A ledger cannot be at {file}: {error}. Name another place: a folder, or the URL of a database."
        ) from error
    raise StorageError(f"There is no ledger at {file}.")


def _connect(file: Path, create: bool) -> sqlite3.Connection:
    mode = "rwc" if create else "rw"
    if not create and not os.access(file.parent, os.W_OK):
        # SQLite creates files beside it even to read, unless there is no log to recover from.
        log = file.with_name(f"{file.name}-wal")
        mode = "ro" if log.exists() and log.stat().st_size else "ro&immutable=1"
    connection = sqlite3.connect(f"{file.as_uri()}?mode={mode}", _WAIT, isolation_level=None, uri=True)
    try:
        if create:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a step that was reported survives a power failure
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _sqlite_engine(url: URL, connect: Any, pool: type[Pool] = NullPool) -> Engine:
    engine = create_engine(url, creator=connect, poolclass=pool, hide_parameters=True)

    @event.listens_for(engine, "begin")  # the driver's own transactions exclude DDL and lock too late
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("emendo_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _server_engine(url: URL, name: str) -> Engine:
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
