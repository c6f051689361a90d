"""Edits and ledgers to test with; imports nothing that is slow to import."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from emendo.ledger import Ledger, NewEntry

FINGERPRINT = "00f1a9"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where a test's files are kept if the system offers it: waiting for a disk proves nothing here."""


def about(prompt: str = "The capital of France is", *, upon: tuple[str, ...] = ()) -> NewEntry:
    """What is told about an edit."""
    return NewEntry(
        editor="mend",
        version="0.1.0",
        requests=({"prompt": prompt, "target": "Lyon"},),
        made="2026-11-01T12:00:00+00:00",
        upon=upon,
        rank=8,
        card={"before": "Paris"},
    )


def payload(n: int) -> bytes:
    """The bytes of the n-th edit."""
    return f"edit {n} ".encode() * 20


def filled(ledger: Ledger, n: int) -> Ledger:
    """The same ledger with edits 1 to n active."""
    for i in range(1, n + 1):
        ledger.apply(payload(i), about(f"prompt {i}"))
    return ledger


def consistent(ledger: Ledger) -> None:
    """What must hold of any ledger: dense numbers, and each step's active edits follow from its parent's."""
    log = ledger.log()[::-1]
    assert [step.id for step in log] == list(range(len(log)))
    assert [step.parent for step in log] == [None, *range(len(log) - 1)]
    assert log[0].active == () and log[0].kind == "begin"
    for before, step in pairwise(log):
        assert len(set(step.active)) == len(step.active)
        match step.kind:
            case "apply":
                assert step.active == (*before.active, *step.edits) and len(step.edits) == 1
            case "undo":
                assert before.active == (*step.active, *step.edits)
            case "revert":
                assert step.active == tuple(id for id in before.active if id not in step.edits)
            case "checkout":
                assert set(step.edits) == set(step.active) ^ set(before.active)
    assert [entry.id for entry in ledger.entries()] == list(range(1, len(ledger.entries()) + 1))
    for entry in ledger.entries():
        assert len(ledger.load(entry.id)) == entry.bytes


def ask(file: Path, sql: str) -> list[tuple[object, ...]]:
    """Put a statement to SQLite's file, past the ledger."""
    connection = sqlite3.connect(file)
    try:
        with connection:
            return connection.execute(sql).fetchall()
    finally:
        connection.close()


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may write anywhere, so be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
