"""Ledgers of other versions of emendo."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect, text
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from emendo.errors import StorageError
from emendo.ledger import Ledger
from emendo.ledger import _migrations as migrations
from emendo.ledger import _schema as tables
from emendo.ledger._database import Database
from emendo.ledger._migrations import MIGRATIONS, Migration
from ledger.samples import FINGERPRINT, about, as_somebody_else, ask, consistent, filled, payload

# The tables of version 1, word for word; never to be changed.
VERSION_1 = """
CREATE TABLE migrations (name VARCHAR(200) NOT NULL, at VARCHAR(40) NOT NULL, PRIMARY KEY (name));
CREATE TABLE about (ledger VARCHAR(36) NOT NULL, fingerprint VARCHAR(64) NOT NULL, model TEXT NOT NULL,
  created VARCHAR(40) NOT NULL, PRIMARY KEY (ledger));
CREATE TABLE payloads (digest VARCHAR(64) NOT NULL, data BLOB NOT NULL, PRIMARY KEY (digest));
CREATE TABLE edits (id INTEGER NOT NULL, digest VARCHAR(64) NOT NULL, editor TEXT NOT NULL, version TEXT NOT NULL,
  requests TEXT NOT NULL, made VARCHAR(40) NOT NULL, upon TEXT NOT NULL, bytes INTEGER NOT NULL, rank INTEGER,
  card TEXT NOT NULL, PRIMARY KEY (id), UNIQUE (digest), FOREIGN KEY(digest) REFERENCES payloads (digest));
CREATE TABLE operations (id INTEGER NOT NULL, parent INTEGER, kind VARCHAR(20) NOT NULL, edits TEXT NOT NULL,
  active TEXT NOT NULL, at VARCHAR(40) NOT NULL, "by" TEXT NOT NULL, note TEXT NOT NULL, forced BOOLEAN NOT NULL,
  health TEXT, PRIMARY KEY (id), UNIQUE (parent), FOREIGN KEY(parent) REFERENCES operations (id));
CREATE TABLE tags (name VARCHAR(200) NOT NULL, operation INTEGER NOT NULL, at VARCHAR(40) NOT NULL, "by" TEXT NOT NULL,
  PRIMARY KEY (name), FOREIGN KEY(operation) REFERENCES operations (id));
CREATE TABLE checks (id INTEGER NOT NULL, operation INTEGER NOT NULL, at VARCHAR(40) NOT NULL, figures TEXT NOT NULL,
  PRIMARY KEY (id), FOREIGN KEY(operation) REFERENCES operations (id));
"""
ROWS_1 = """
INSERT INTO migrations VALUES ('0001 the first tables', '2026-11-01T12:00:00+00:00');
INSERT INTO about VALUES ('8b0c', '00f1a9', 'tiny', '2026-11-01T12:00:00+00:00');
INSERT INTO payloads VALUES ('2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae', x'666f6f');
INSERT INTO edits VALUES (1, '2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae', 'mend', '0.1.0',
  '[{"prompt": "a", "target": "b"}]', '2026-11-01', '[]', 3, 8, '{}');
INSERT INTO operations VALUES (0, NULL, 'begin', '[]', '[]', '2026-11-01', 'ada', '', 0, NULL);
INSERT INTO operations VALUES (1, 0, 'apply', '[1]', '[1]', '2026-11-01', 'ada', 'old', 1, '{"kl": Infinity}');
INSERT INTO tags VALUES ('v1', 1, '2026-11-01', 'ada');
INSERT INTO checks VALUES (1, 1, '2026-11-01', '{"held": 1}');
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a ledger that version 1 left."""
    return left_by_version_1(tmp_path)


def left_by_version_1(folder: Path) -> Path:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.executescript(f"PRAGMA journal_mode = WAL; {VERSION_1} {ROWS_1}")
    connection.close()
    return folder


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the rights of POSIX")
@pytest.mark.parametrize(
    "modes", [(0o444, 0o777), (0o666, 0o555), (0o444, 0o555)], ids=["file", "folder", "both"]
)
def test_an_old_ledger_that_is_read_only(shared: Path, modes: tuple[int, int]) -> None:
    """A copy is converted and read as the converted ledger is; the file stays as it was."""
    left_by_version_1(shared)
    converted = Ledger.open(shutil.copytree(shared, shared / "writable"))
    file = shared / "ledger.sqlite"
    before = file.read_bytes()
    file.chmod(modes[0])
    shared.chmod(modes[1])
    with as_somebody_else():
        ledger = Ledger.open(shared, FINGERPRINT)
        assert [step.as_dict() for step in ledger.log()] == [step.as_dict() for step in converted.log()]
        assert ledger.entries() == converted.entries() and ledger.tags() == converted.tags()
        assert ledger.diff(0, "v1") == converted.diff(0, "v1")
        assert ledger.load(1) == b"foo"
        for change in (ledger.undo, lambda: ledger.tag("v2"), lambda: filled(ledger, 1)):
            with pytest.raises(StorageError, match=rf"{shared}.*read-only"):
                change()
        assert ledger.head.id == 1
    assert file.read_bytes() == before


def _colour(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE tags ADD COLUMN colour TEXT"))
    connection.execute(text("CREATE TABLE paints (name TEXT)"))
    connection.execute(text("UPDATE tags SET colour = 'red'"))


COLOUR = Migration("9002 tags have a colour", _colour)


def schema(folder: Path) -> list[str]:
    rows = ask(folder / "ledger.sqlite", "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
    return [re.sub(r"\s+", " ", str(sql)).replace("( ", "(").replace(" )", ")") for (sql,) in rows]


def test_the_first_version_never_changes(old: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    new = tmp_path_factory.mktemp("new")
    assert MIGRATIONS[0].name == "0001 the first tables"

    def first(connection: Connection) -> None:
        migrations.begin(connection)
        migrations.run(MIGRATIONS[0], connection)

    Database(new, create=True).write(first)
    assert schema(new) == schema(old)


def test_an_old_ledger_gets_the_tables_of_a_new_one(old: Path, tmp_path: Path) -> None:
    Ledger.open(old)
    Ledger.create(tmp_path / "new", FINGERPRINT, "tiny")
    assert schema(old) == schema(tmp_path / "new")


def test_the_first_version_is_understood(old: Path) -> None:
    ledger = Ledger.open(old, FINGERPRINT)
    consistent(ledger)
    assert (ledger.id, ledger.head.note, ledger.head.forced, ledger.load(1)) == ("8b0c", "old", True, b"foo")
    assert ledger.head.health == {"kl": float("inf")}
    assert ledger.tags()[0].operation == ledger.checks()[0].operation == 1
    assert filled(ledger, 2).head.active == (1, 2, 3)


def _history(steps: int) -> list[tuple[str, list[int]]]:
    """A random history as version 1 stored it: the kind of each step and the list of all edits active after it."""
    chance, states, last = random.Random(0), [[]], 0
    found: list[tuple[str, list[int]]] = [("begin", [])]
    while len(found) <= steps:
        now, kind = states[-1], chance.choice(("apply", "apply", "apply", "undo", "revert", "checkout"))
        if kind == "apply":
            known = [edit for edit in range(1, last + 1) if edit not in now]
            edit = chance.choice(known) if known and chance.random() < 0.3 else last + 1
            last, after = max(last, edit), [*now, edit]
        elif kind == "checkout":
            after = chance.choice(states)
        elif not now:
            continue
        else:
            gone = now[-chance.randint(1, min(3, len(now))) :] if kind == "undo" else [chance.choice(now)]
            after = [edit for edit in now if edit not in gone]
        states.append(after)
        found.append((kind, after))
    return found


def test_a_long_history_is_converted_without_loss(tmp_path: Path) -> None:
    history = _history(200)
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.executescript(f"{VERSION_1} {ROWS_1.split('INSERT INTO payloads')[0]}")
    for n in range(1, 1 + max(edit for _, active in history for edit in active)):
        digest, request = (
            hashlib.sha256(payload(n)).hexdigest(),
            json.dumps([{"prompt": f"p{n % 7}", "target": "t"}]),
        )
        connection.execute("INSERT INTO payloads VALUES (?, ?)", (digest, payload(n)))
        row = (n, digest, "mend", "0", request, "", "[]", len(payload(n)), 8, "{}")
        connection.execute("INSERT INTO edits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    for id, (kind, active) in enumerate(history):
        before = history[id - 1][1] if id else []
        edits = json.dumps(sorted({*active} ^ {*before}))
        row = (id, id - 1 if id else None, kind, edits, json.dumps(active), "", "ada", "", 0, None)
        connection.execute("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    connection.commit()
    connection.close()
    ledger = Ledger.open(tmp_path)
    log = ledger.log()[::-1]
    assert [(step.kind, list(step.active)) for step in log] == history
    assert [step.active_count for step in log] == [len(active) for _, active in history]
    same = ledger.with_same_prompts([{"prompt": " P3 "}])
    assert [entry.id for entry in same] == sorted(id for id in ledger.head.active if id % 7 == 3)
    ledger.checkout(100)
    ledger.undo()
    assert list(ledger.head.active) == history[100][1][:-1]


@pytest.mark.parametrize("active", ["5", "[1, 2", "[77]", "[1, 1]", '["1"]', "{}", "[" * 100_000])
def test_a_damaged_old_ledger_is_refused_and_left_as_it_is(old: Path, active: str) -> None:
    ask(old / "ledger.sqlite", f"UPDATE operations SET active = '{active}' WHERE id = 1")
    before = schema(old)
    with pytest.raises(StorageError, match="damaged"):
        Ledger.open(old)
    assert schema(old) == before


def test_the_store_asks_for_what_the_migrations_made(ledger: Ledger) -> None:
    with ledger._database.reading() as connection:
        made = inspect(connection)
        for table in (
            tables.about,
            tables.payloads,
            tables.edits,
            tables.operations,
            tables.periods,
            tables.prompts,
            tables.tags,
            tables.checks,
        ):
            found = {column["name"] for column in made.get_columns(table.name)}
            assert found == set(table.c.keys())


def test_opening_migrates(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Ledger.open(old).log()
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, COLOUR))
    for _ in range(2):  # once is enough
        assert Ledger.open(old).log() == before
    assert ask(old / "ledger.sqlite", "SELECT name, colour FROM tags") == [("v1", "red")]
    names = [name for (name,) in ask(old / "ledger.sqlite", "SELECT name FROM migrations ORDER BY name")]
    assert names == [*(migration.name for migration in MIGRATIONS), COLOUR.name]

    monkeypatch.setattr(migrations, "MIGRATIONS", MIGRATIONS)
    with pytest.raises(StorageError, match="from a newer emendo"):
        Ledger.open(old)


def _stop(error: BaseException) -> Callable[[Connection], None]:
    def run(connection: Connection) -> None:
        _colour(connection)
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("bug"), RuntimeError)]
)
def test_a_migration_that_fails_midway_leaves_nothing(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, seen: type[BaseException]
) -> None:
    Ledger.open(old)
    before, good = schema(old), Migration("9001 good", lambda connection: None)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, good, Migration("9002 bad", _stop(error))))
    with pytest.raises(seen):
        Ledger.open(old)
    assert schema(old) == before
    names = [name for (name,) in ask(old / "ledger.sqlite", "SELECT name FROM migrations")]
    assert names == [*(migration.name for migration in MIGRATIONS), "9001 good"]  # what went before it stands
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, good, COLOUR))
    assert Ledger.open(old).head.id == 1


def test_a_beginning_that_fails_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        migrations, "MIGRATIONS", (*MIGRATIONS, Migration("9001 bad", _stop(RuntimeError("bug"))))
    )
    with pytest.raises(RuntimeError, match="bug"):
        Ledger.create(tmp_path, FINGERPRINT, "tiny")
    assert schema(tmp_path) == []
    monkeypatch.setattr(migrations, "MIGRATIONS", MIGRATIONS)
    Ledger.create(tmp_path, FINGERPRINT, "tiny").apply(payload(1), about())


@pytest.mark.parametrize(
    ("dialect", "types"),
    [
        (mysql.dialect(), {"data": "LONGBLOB", "active": "LONGTEXT"}),
        (postgresql.dialect(), {"data": "BYTEA", "active": "TEXT"}),
    ],
)
def test_columns_are_large_enough_elsewhere(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, dialect: Any, types: dict[str, str]
) -> None:
    """MySQL's BLOB and TEXT end at 64 KB."""
    made: list[str] = []

    def create_all(self: Any, *_: Any, **__: Any) -> None:
        made.extend(str(CreateTable(table).compile(dialect=dialect)) for table in self.sorted_tables)

    monkeypatch.setattr(migrations.MetaData, "create_all", create_all)
    with ledger._database.reading() as connection:
        MIGRATIONS[0].run(connection)
    for column, kind in types.items():
        assert f"{column} {kind} NOT NULL" in "".join(made)
