"""Run as a program of its own, without torch, so that it may fork: many processes at one ledger, and killed ones.

``python workers.py TASK FOLDER_OR_URL [NUMBER]`` prints what it saw as JSON; a task that sees a third state fails.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from emendo.errors import EmendoError, StorageError
from emendo.ledger import Ledger
from emendo.ledger import _migrations as migrations
from ledger.samples import FINGERPRINT, about, consistent, filled, payload

WORKERS = 8


def together(work: Callable[[int], Any]) -> list[Any]:
    """The results of 8 processes that start at the same moment."""
    go, start = os.pipe()
    pids, pipes = [], []
    for number in range(WORKERS):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(start)
            os.read(go, 1)  # until the parent closes it
            try:
                result = work(number)
            except EmendoError as error:
                result = type(error).__name__
            os.write(writer, json.dumps(result).encode())
            os._exit(0)
        os.close(writer)
        pids.append(pid)
        pipes.append(reader)
    os.close(start)
    results = [json.loads(b"".join(iter(lambda pipe=pipe: os.read(pipe, 65536), b""))) for pipe in pipes]
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    return results


def crowd(where: str, each: int = 8) -> dict[str, Any]:
    """All begin the ledger, all open it, and all apply, tag and check at once; nothing may be lost."""
    begun = together(lambda _: Ledger.create(where, FINGERPRINT, "tiny").id)
    assert begun.count("StorageError") == WORKERS - 1, begun

    def work(number: int) -> list[int]:
        ledger, steps = Ledger.open(where, FINGERPRINT), []
        for i in range(each):
            steps.append(ledger.apply(payload(100 * number + i), about(), by=f"worker {number}").id)
            if i % 4 == 3:
                steps.append(ledger.revert(_mine(ledger, number), by=f"worker {number}").id)
                ledger.tag(f"{number} at {i}")
                ledger.add_check({"worker": number})
        return steps

    steps = together(work)
    ledger = Ledger.open(where, FINGERPRINT)
    consistent(ledger)
    assert all(mine == sorted(mine) for mine in steps)
    assert sorted(itertools.chain(*steps)) == [step.id for step in ledger.log()[:-1]][::-1]
    wanted = sorted(payload(100 * number + i) for number in range(WORKERS) for i in range(each))
    assert sorted(ledger.load(entry.id) for entry in ledger.entries()) == wanted
    by = {step.id: step.by for step in ledger.log()}
    assert all(by[id] == f"worker {number}" for number in range(WORKERS) for id in steps[number])
    assert len(ledger.tags()) == len(ledger.checks()) == WORKERS * each // 4
    return {"steps": ledger.head.id, "active": len(ledger.active)}


def _mine(ledger: Ledger, number: int) -> int:
    """The latest active edit of a worker."""
    mine = {id for step in ledger.log() if step.by == f"worker {number}" for id in step.edits}
    return next(id for id in reversed(ledger.head.active) if id in mine)


def writers(where: str, each: int = 50) -> dict[str, Any]:
    """All apply at once, every fourth edit with a slow check; nobody is refused."""
    Ledger.create(where, FINGERPRINT, "tiny")

    def check(head: Any) -> Any:
        time.sleep(0.002)
        return {"health": {"upon": head.id}}

    def work(number: int) -> int:
        ledger = Ledger.open(where, FINGERPRINT)
        for i in range(each):
            data = payload(1000 * number + i)
            if i % 4:
                ledger.apply(data, about())
            else:
                ledger.apply_checked(data, about(), check)
        return each

    assert together(work) == [each] * WORKERS
    ledger = Ledger.open(where)
    consistent(ledger)
    checked = [step for step in ledger.log() if step.health is not None]
    assert all(step.health == {"upon": step.parent} for step in checked)
    return {"active": len(ledger.active), "checked": len(checked)}


def migrate(where: str) -> dict[str, Any]:
    """All open an older ledger at once: each migration is run by one of them."""
    filled(Ledger.create(where, FINGERPRINT, "tiny"), 2)

    def run(connection: Any) -> None:
        connection.exec_driver_sql("ALTER TABLE tags ADD COLUMN colour TEXT")

    migrations.MIGRATIONS += (
        migrations.Migration("9001 colour", run),
        migrations.Migration("9002", lambda _: None),
    )
    assert together(lambda _: Ledger.open(where).head.id) == [2] * WORKERS
    return {}


# ---------------------------------------------------------------------------------------- killing


def _child(work: Callable[[Callable[[Any], None]], None]) -> tuple[int, int]:
    """A forked process, and the end of the pipe on which it says what it is about to do and what it has done."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            work(lambda value: os.write(writer, b"\n" + json.dumps(value).encode()))
            status = 0
        finally:
            os._exit(status)  # never on into the parent's code
    os.close(writer)
    return pid, reader


def _check(folder: str, reader: int, before: list[int]) -> tuple[list[int], bool]:
    """After a kill: the active edits, and whether the kill fell into a step; a third state fails."""
    with os.fdopen(reader) as pipe:
        said = [before, *(json.loads(line) for line in pipe if line.strip())]
    old, new = (said[-1], None) if len(said) % 2 else (said[-2], said[-1])
    ledger = Ledger.open(folder, FINGERPRINT)
    now = list(ledger.head.active)
    assert now in (old, new), (old, new, now)
    connection = sqlite3.connect(Path(folder) / "ledger.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    for id in now[-2:]:
        assert len(ledger.load(id)) == ledger.entry(id).bytes
    return now, new is not None


def _steps(folder: str, say: Callable[[Any], None], die_at: int | None = None) -> None:
    """Steps of every kind, each announced with the state it leads to, and confirmed; one only to die in it."""
    ledger = Ledger.open(folder)
    next_id, active = len(ledger.entries()) + 1, list(ledger.head.active)
    for step in range(ledger.head.id, ledger.head.id + (1 if die_at else 10_000)):
        match step % 6:
            case 0 | 1 | 2:
                data = bytes([step % 251]) * (300 + 7001 * (step % 20)) + str(step).encode()
                active, do = [*active, next_id], lambda data=data: ledger.apply(data, about())
                next_id += 1
            case 3:
                active, do = active[:-1], ledger.undo
            case 4:
                first = active[0]
                active, do = active[1:], lambda first=first: ledger.revert(first)
            case _:
                then = max(0, step - 4)
                active, do = list(ledger.operation(then).active), lambda then=then: ledger.checkout(then)
        say(active)
        if die_at is not None:
            _die_at(die_at)
        do()
        say(active)


def kill_anywhere(folder: str, points: int = 40) -> dict[str, Any]:
    """SIGKILL from outside, later and later, with some chance in it."""
    Ledger.create(folder, FINGERPRINT, "tiny")
    chance, active, inside = random.Random(0), [], 0
    for point in range(points):
        pid, reader = _child(lambda say: _steps(folder, say))
        os.read(reader, 1)  # until the first announcement
        time.sleep(0.003 * point + 0.01 * chance.random())
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        active, hit = _check(folder, reader, active)
        inside += hit
    ledger = Ledger.open(folder)
    consistent(ledger)
    return {"points": points, "inside a step": inside, "steps": ledger.head.id}


def _die_at(moment: int) -> None:
    """Be killed at the n-th moment from now: before or after a statement, or before a commit."""
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
        event.listen(Engine, name, count)


def kill_everywhere(folder: str) -> dict[str, Any]:
    """SIGKILL at every statement of each kind of step: the event hook kills its own process."""
    ledger = filled(Ledger.create(folder, FINGERPRINT, "tiny"), 3)
    active, points = [1, 2, 3], {}
    for _ in range(4):  # undo, revert, checkout, apply: killed at later and later moments until it lives
        status, moment = -1, 0
        while status != 0:
            moment += 1
            pid, reader = _child(lambda say, moment=moment: _steps(folder, say, moment))
            status = os.waitpid(pid, 0)[1]
            assert status in {0, signal.SIGKILL}, status
            active, _ = _check(folder, reader, active)
        points[ledger.head.kind] = moment - 1
    consistent(ledger)
    return points


def kill_a_beginning(folder: str) -> dict[str, Any]:
    """SIGKILL while a ledger is begun: afterwards it is there, or it can be begun again."""
    begun = 0
    for moment in range(1, 160, 12):

        def begin(_: Callable[[Any], None], moment: int = moment) -> None:
            _die_at(moment)
            Ledger.create(f"{folder}/{moment}", FINGERPRINT, "tiny")

        pid, reader = _child(begin)
        status = os.waitpid(pid, 0)[1]
        os.close(reader)
        try:
            ledger = Ledger.open(f"{folder}/{moment}")
            begun += 1
        except StorageError:
            ledger = Ledger.create(f"{folder}/{moment}", FINGERPRINT, "tiny")
        assert ledger.head.id == 0 and ledger.apply(payload(1), about()).active == (1,)
    assert status == 0
    return {"begun": begun, "points": moment}


def stop_inside(folder: str) -> dict[str, Any]:
    """A process stopped just before its commit: others read the old state, and write as soon as it is killed."""
    filled(Ledger.create(folder, FINGERPRINT, "tiny"), 2)

    def work(_: Callable[[Any], None]) -> None:
        event.listen(Engine, "commit", lambda connection: _stop_writer(connection))
        Ledger.open(folder).undo()

    pid, reader = _child(work)
    os.close(reader)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    ledger = Ledger.open(folder)
    assert ledger.head.active == (1, 2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ledger.head.active == (1, 2) and ledger.revert(1).active == (2,)
    consistent(ledger)
    return {}


def _stop_writer(connection: Any) -> None:
    if connection.get_execution_options().get("emendo_writes"):
        os.kill(os.getpid(), signal.SIGSTOP)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (crowd, writers, migrate, kill_anywhere, kill_everywhere, kill_a_beginning, stop_inside)
}

if __name__ == "__main__":
    assert "torch" not in sys.modules
    sys.stdout.write(json.dumps(TASKS[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))))
