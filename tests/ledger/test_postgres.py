"""A ledger in PostgreSQL: a server of its own, started from the system's programs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text

from cases import in_slow_suite
from emendo.errors import MismatchError, StorageError
from emendo.ledger import Ledger
from emendo.ledger import _database as database
from emendo.ledger.place import create_ledger, find_ledger, open_ledger
from ledger import test_store as unit
from ledger.samples import FINGERPRINT, MEMORY, about, consistent, filled, payload
from ledger.test_processes import run

pytestmark = pytest.mark.postgres


def _programs() -> Path:
    """The folder of PostgreSQL's programs."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'emendo[postgres]'")
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    if not folders:
        pytest.skip("no PostgreSQL: neither initdb on the PATH nor /usr/lib/postgresql/*/bin")
    return folders[-1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The folder of the socket of a running server."""
    programs, folder = _programs(), Path(tempfile.mkdtemp(dir=MEMORY))
    prefix: list[str] = []
    if os.geteuid() == 0:  # whom PostgreSQL does not serve
        import pwd

        user = next(
            name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()}
        )
        prefix = ["runuser", "-u", user, "--"]
        shutil.chown(folder, user)
    data = folder / "data"

    def call(*command: str) -> None:
        done = subprocess.run([*prefix, *command], cwd="/", capture_output=True, text=True)
        log = folder / "log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")

    try:
        initdb, pg_ctl = str(programs / "initdb"), str(programs / "pg_ctl")
        call(initdb, "-D", str(data), "-U", "emendo", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        (data / "pg_hba.conf").write_text("local all guarded scram-sha-256\nlocal all all trust\n")
        settings = f"-k {folder} -c listen_addresses= -c fsync=off"
        call(pg_ctl, "-D", str(data), "-l", str(folder / "log"), "-o", settings, "-w", "start")
        try:
            yield str(folder)
        finally:
            call(pg_ctl, "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


_numbers = count()


@pytest.fixture
def url(server: str) -> str:
    """An empty schema, as a URL."""
    schema = f"ledger{next(_numbers)}"
    _sql(server, f"CREATE SCHEMA {schema}")
    return f"postgresql://emendo@/postgres?host={server}&options=-csearch_path%3D{schema}"


def _sql(server: str, *statements: str) -> None:
    engine = create_engine(f"postgresql+psycopg://emendo@/postgres?host={server}")
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@pytest.mark.parametrize(
    "scenario",
    [
        unit.test_apply_keeps_the_bytes_and_what_is_known,
        unit.test_undo_takes_the_last_off,
        *in_slow_suite(
            unit.test_revert_takes_any_off,
            unit.test_an_edit_put_on_again_keeps_its_number,
            unit.test_later_upon_names_those_computed_in_its_presence,
            unit.test_tags_checkout_and_diff,
            unit.test_the_log_is_the_latest_first,
            unit.test_checks_belong_to_an_operation,
            unit.test_a_step_decided_upon_an_older_state,
            unit.test_undo_of_nothing,
        ),
    ],
)
def test_steps_and_questions(url: str, scenario: Callable[[Ledger], None]) -> None:
    """The very tests of SQLite."""
    scenario(Ledger.create(url, FINGERPRINT, "tiny"))


def test_opening(url: str, server: str) -> None:
    with pytest.raises(StorageError, match=r"There is no ledger at postgresql\+psycopg://emendo@/postgres"):
        Ledger.open(url)
    ledger = filled(Ledger.create(url, FINGERPRINT, "tiny"), 1)
    assert Ledger.open(url, FINGERPRINT).active == ledger.active
    with pytest.raises(MismatchError):
        Ledger.open(url, "beef")
    with pytest.raises(StorageError, match="already"):
        Ledger.create(url, FINGERPRINT, "tiny")
    with pytest.raises(StorageError, match="read-only"):
        Ledger.open(read_only := url + "%20-cdefault_transaction_read_only%3Don").undo()
    with create_engine(
        database.locate(url), poolclass=NullPool
    ).begin() as connection:  # as if it had not been converted yet
        connection.execute(text("DELETE FROM migrations WHERE name LIKE '0002%'"))
    with pytest.raises(
        StorageError, match=r"has to be converted, but the database is read-only\. Open it once"
    ):
        Ledger.open(read_only)
    with pytest.raises(StorageError, match="The server cannot be reached"):
        Ledger.open(url.replace(server, "/nowhere"))


def test_somebody_elses_tables(url: str, server: str) -> None:
    schema = url.rpartition("%3D")[2]
    _sql(server, f"CREATE TABLE {schema}.customers (id INTEGER)")
    with pytest.raises(StorageError, match=r"holds other tables \(customers\)"):
        Ledger.create(url, FINGERPRINT, "tiny")


@pytest.mark.slow
def test_eight_processes_at_once_lose_nothing(url: str) -> None:
    assert run("crowd", url, 4) == {"steps": 40, "active": 24}


@pytest.mark.slow
def test_eight_writers_are_never_refused(url: str) -> None:
    assert run("writers", url, 4) == {"active": 32, "checked": 8}


@pytest.mark.slow
def test_eight_processes_migrate_at_once(url: str) -> None:
    run("migrate", url)


@pytest.mark.slow
def test_stopped_and_killed_inside_a_transaction(url: str) -> None:
    run("stop_inside", url)


@pytest.mark.slow
def test_without_the_lock_the_keys_tell(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.create(url, FINGERPRINT, "tiny")
    monkeypatch.setattr(database, "_LOCK", "(random() * 1e9)::bigint")  # everybody takes another one
    with ThreadPoolExecutor(8) as pool:
        steps = list(pool.map(lambda n: ledger.apply(payload(n), about()).id, range(24)))
    assert sorted(steps) == list(range(1, 25)) and len(ledger.active) == 24
    consistent(ledger)


def test_a_password_is_asked_for_each_time(
    url: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path))
    schema = url.rpartition("%3D")[2]
    _sql(server, "CREATE ROLE guarded LOGIN PASSWORD 's3cret'", f"GRANT ALL ON SCHEMA {schema} TO guarded")
    full = url.replace("emendo@", "guarded:s3cret@")
    ledger = create_ledger("m", FINGERPRINT, full)
    assert "s3cret" not in ledger.where and "s3cret" not in (find_ledger("m") or "")
    with pytest.raises(
        StorageError, match=r"asks for a password, which ledger\.json does not store"
    ) as error:
        open_ledger("m", FINGERPRINT)
    assert "s3cret" not in str(error.value)
    with pytest.raises(StorageError, match="password") as error:
        open_ledger("m", FINGERPRINT, full.replace("s3cret", "wr0ng"))
    assert "wr0ng" not in str(error.value)
    assert open_ledger("m", FINGERPRINT, full).id == ledger.id
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    assert open_ledger("m", FINGERPRINT).id == ledger.id
