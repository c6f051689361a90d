"""Ledgers that are missing, damaged, full, or not to be written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emendo.errors import EmendoError, RequestError, StorageError
from emendo.ledger import Ledger
from emendo.ledger import _database as database
from emendo.ledger import _schema as schema
from ledger.samples import FINGERPRINT, about, as_somebody_else, ask, consistent, filled, payload


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of a ledger with three active edits."""
    filled(Ledger.create(tmp_path, FINGERPRINT, "tiny"), 3)
    return tmp_path / "ledger.sqlite"


def everything(file: Path) -> Any:
    ledger = Ledger.open(file.parent)
    edits = ledger.entries()
    return (
        ledger.log(),
        ledger.active,
        edits,
        [ledger.load(edit.id) for edit in edits],
        ledger.tags(),
        ledger.checks(),
    )


def test_no_ledger_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"There is no ledger at .*ledger\.sqlite"):
        Ledger.open(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []  # looking makes nothing


def test_an_interrupted_beginning_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    with pytest.raises(StorageError, match=r"no ledger at .* yet"):
        Ledger.open(tmp_path)
    Ledger.create(tmp_path, FINGERPRINT, "tiny")
    assert Ledger.open(tmp_path).head.id == 0


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="A ledger cannot be at"):
        Ledger.create(tmp_path / "file", FINGERPRINT, "tiny")


def test_somebody_elses_tables(tmp_path: Path) -> None:
    ask(tmp_path / "ledger.sqlite", "CREATE TABLE customers (id INTEGER)")
    with pytest.raises(StorageError, match=r"holds other tables \(customers\)"):
        Ledger.create(tmp_path, FINGERPRINT, "tiny")
    with pytest.raises(StorageError, match="no ledger"):
        Ledger.open(tmp_path)


def test_one_byte_of_an_edit_flipped(file: Path) -> None:
    ask(file, f"UPDATE payloads SET data = x'{payload(2)[:-1].hex()}21' WHERE data = x'{payload(2).hex()}'")
    ledger = Ledger.open(file.parent)
    assert ledger.load(1) == payload(1) and ledger.load(3) == payload(3)
    with pytest.raises(StorageError, match=r"Edit 2 is damaged .*revert 2"):
        ledger.load(2)
    ledger.revert(2)
    ledger.apply(payload(2), about())  # as the message says
    assert ledger.load(2) == payload(2)
    consistent(ledger)


def test_an_edits_bytes_lost(file: Path) -> None:
    ask(file, f"DELETE FROM payloads WHERE data = x'{payload(2).hex()}'")
    with pytest.raises(StorageError, match="Edit 2 is damaged"):
        Ledger.open(file.parent).load(2)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE operations SET edits = '[1, 2'",
        "UPDATE operations SET edits = 5",
        "UPDATE operations SET active_count = 'many'",
        "UPDATE operations SET health = '[1]'",
        "UPDATE periods SET edit = 77 WHERE edit = 2",
        "UPDATE periods SET position = 'x'",
        "UPDATE edits SET requests = CAST(x'ff' AS TEXT)",
        "DELETE FROM operations",
        "DROP TABLE operations",
        "DELETE FROM edits WHERE id = 2",
        "ALTER TABLE edits DROP COLUMN card",
    ],
)
def test_damaged_rows(file: Path, sql: str) -> None:
    ask(file, sql)
    with pytest.raises(StorageError):
        everything(file)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a ledger with a row in every table, and every kind of step."""
    folder = tmp_path_factory.mktemp("full")
    ledger = filled(Ledger.create(folder, FINGERPRINT, "tiny"), 3)
    ledger.revert(2, health={"kl": 0.5, "limits": {"kl": 1.0}})
    ledger.undo()
    ledger.checkout(3)
    ledger.tag("good")
    ledger.add_check({"retention": 1.0, "drift": {"kl": 0.5}})
    return (folder / "ledger.sqlite").read_bytes()


COLUMNS = [
    (table.name, column)
    for table in (schema.about, schema.payloads, schema.edits, schema.prompts, schema.operations)
    for column in table.c.keys()  # noqa: SIM118
] + [(t.name, c) for t in (schema.periods, schema.tags, schema.checks) for c in t.c.keys()]  # noqa: SIM118
VALUES = [
    *(
        None,
        0,
        1,
        5,
        -1,
        2**31,
        2**63 - 1,
        1.5,
        float("inf"),
        "",
        "x",
        "5",
        "\udc00",
        "\x1b[2J",
        b"",
        b"\xff",
        b"[1]",
    ),
    *(
        "{",
        "{}",
        "[]",
        "[1]",
        "[9]",
        "null",
        "NaN",
        '"x"',
        "[" * 100_000,
        "9" * 5000,
        '[{"prompt": 1}]',
        "[[]]",
    ),
    *(
        '{"limits": 5, "kl": "x"}',
        '{"drift": [], "retention": {}}',
        '["a"]',
        "8b0c@1",
        '["8b0c@99999999999999999999"]',
    ),
]


@pytest.mark.parametrize("examples", [10, pytest.param(400, marks=pytest.mark.slow)], ids=["few", "many"])
def test_no_value_of_a_row_ends_in_another_error(full: bytes, tmp_path: Path, examples: int) -> None:
    """Whatever stands in whichever column: the ledger works, or an error of ours says that it does not."""

    @settings(max_examples=examples, deadline=None)
    @given(
        where=st.sampled_from(COLUMNS),
        value=st.sampled_from(VALUES) | st.text(max_size=9),
        row=st.integers(0, 3),
    )
    def check(where: tuple[str, str], value: object, row: int) -> None:
        _use_with(full, tmp_path, where, value, row)

    check()


def _use_with(full: bytes, tmp_path: Path, where: tuple[str, str], value: object, row: int) -> None:
    """Every use of a ledger with a value in one of its rows."""
    (table, column), file = where, tmp_path / "ledger.sqlite"
    for old in tmp_path.iterdir():
        old.unlink()
    file.write_bytes(full)
    connection = sqlite3.connect(file)
    chosen = f"(SELECT rowid FROM {table} LIMIT 1 OFFSET {row})"
    with (
        contextlib.suppress(sqlite3.Error, UnicodeEncodeError),
        connection,
    ):  # a value that the column refuses
        connection.execute(f'UPDATE {table} SET "{column}" = ? WHERE rowid = {chosen}', (value,))
    connection.close()
    ledger: list[Ledger] = []
    for use in (
        lambda: ledger.append(Ledger.open(tmp_path)),
        lambda: [step.as_dict() for step in ledger[0].log()],
        lambda: [ledger[0].load(entry.id) for entry in ledger[0].active],
        lambda: (ledger[0].tags(), ledger[0].checks(), ledger[0].diff("good", 1), ledger[0].operations_of(2)),
        lambda: (ledger[0].later_upon(1), ledger[0].with_same_prompts([{"prompt": "prompt 1"}])),
        lambda: [ledger[0].made_upon(entry) for entry in ledger[0].entries()],
        lambda: ledger[0].apply(payload(9), about()),
        lambda: ledger[0].undo(),
        lambda: ledger[0].revert(1),
        lambda: ledger[0].checkout(4),
        lambda: ledger[0].tag("again"),
    ):
        with contextlib.suppress(EmendoError):
            use()
        if not ledger:
            return


def test_no_damage_gives_a_wrong_state(file: Path) -> None:
    """A page overwritten, or the file cut: an error of ours or the truth, whichever page it is."""
    whole, truth = file.read_bytes(), everything(file)
    refused = 0
    for start in range(0, len(whole), 4096):
        for damaged in (whole[:start] + b"\x5a" * 4096 + whole[start + 4096 :], whole[:start]):
            file.write_bytes(damaged)
            try:
                assert everything(file) == truth
            except StorageError:
                refused += 1
    assert refused > 20
    file.write_bytes(whole)
    assert everything(file) == truth


@pytest.mark.parametrize("sql", ["INSERT INTO migrations VALUES ('0999 from the future', '2031')"])
def test_a_ledger_of_a_newer_version(file: Path, sql: str) -> None:
    ask(file, sql)
    for use in (lambda: Ledger.open(file.parent), lambda: Ledger.create(file.parent, FINGERPRINT, "tiny")):
        with pytest.raises(StorageError, match=r"newer emendo \(it has '0999 from the future'\)"):
            use()


def test_a_full_disk_leaves_the_state_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = everything(file), database._connect

    def small(*given: Any) -> sqlite3.Connection:
        connection = real(*given)
        connection.execute("PRAGMA max_page_count = 1")  # no page more than there are
        return connection

    monkeypatch.setattr(database, "_connect", small)
    with pytest.raises(StorageError, match="The disk is full; the ledger is as it was"):
        Ledger.open(file.parent).apply(b"x" * 100_000, about())
    monkeypatch.setattr(database, "_connect", real)
    assert everything(file) == before


def test_a_full_disk_is_named_where_sqlite_does_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite cannot extend the index of its log and speaks of an I/O error."""
    ledger = Ledger.open(file.parent)

    def broken(*_: Any) -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(database, "_connect", broken)
    with pytest.raises(StorageError, match=r"The disk reports an error.*disk I/O error"):
        Ledger.open(file.parent)
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    with pytest.raises(StorageError, match=r"The disk is full"):
        Ledger.open(file.parent)
    monkeypatch.undo()
    assert ledger.head.id == 3


@pytest.mark.parametrize("number", [-1, 2**31, 2**63, 10**30])
def test_numbers_beyond_those_of_the_database(file: Path, number: int) -> None:
    ledger = Ledger.open(file.parent)
    for use in (ledger.entry, ledger.load, ledger.revert, ledger.operation, ledger.checkout, ledger.undo):
        with pytest.raises(RequestError):
            use(number)
    assert len(ledger.log(number)) in {0, 4}
    with pytest.raises(RequestError, match="no tag"):
        ledger.operation("9" * 5000)


def test_somebody_who_does_not_let_go(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_WAIT", 0.1)
    ledger, other = Ledger.open(file.parent), sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="Another process has locked it"):
        ledger.undo()
    assert ledger.head.id == 3  # reading waits for nobody
    other.close()
    assert ledger.undo().id == 4


# ------------------------------------------------------------------------------------ rights


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the rights of POSIX")
@pytest.mark.parametrize(
    "prepare", [lambda file: None, lambda file: file.chmod(0o666)], ids=["file", "folder"]
)
def test_a_read_only_folder_can_be_read(shared: Path, prepare: Callable[[Path], None]) -> None:
    filled(Ledger.create(shared, FINGERPRINT, "tiny"), 2)
    (shared / "ledger.sqlite").chmod(0o444)
    prepare(shared / "ledger.sqlite")
    shared.chmod(0o555)
    with as_somebody_else():
        ledger = Ledger.open(shared)
        consistent(ledger)
        assert ledger.head.active == (1, 2)
        with pytest.raises(StorageError, match="read-only"):
            ledger.undo()
    assert [file.name for file in shared.iterdir()] == ["ledger.sqlite"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the rights of POSIX")
def test_nothing_can_be_begun_in_a_read_only_folder(shared: Path) -> None:
    shared.chmod(0o555)
    for place in (shared, shared / "sub"):
        with as_somebody_else(), pytest.raises(StorageError, match=r"cannot be opened|Permission denied"):
            Ledger.create(place, FINGERPRINT, "tiny")
