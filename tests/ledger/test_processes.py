"""Many processes at one ledger, and killed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def run(task: str, where: Path | str, *numbers: int) -> Any:
    """What a task of ``workers.py`` saw; it runs without torch, so that it may fork."""
    program = [sys.executable, str(HERE / "workers.py"), task, str(where), *map(str, numbers)]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_eight_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    assert run("crowd", tmp_path) == {"steps": 80, "active": 48}


def test_eight_writers_are_never_refused(tmp_path: Path) -> None:
    assert run("writers", tmp_path, 50) == {"active": 400, "checked": 104}


def test_eight_processes_migrate_at_once(tmp_path: Path) -> None:
    run("migrate", tmp_path)


def test_killed_anywhere(tmp_path: Path) -> None:
    seen = run("kill_anywhere", tmp_path)
    assert seen["points"] == 40 and seen["inside a step"] > 0 and seen["steps"] > 0, seen


def test_killed_at_every_statement(tmp_path: Path) -> None:
    seen = run("kill_everywhere", tmp_path)
    assert sorted(seen) == ["apply", "checkout", "revert", "undo"] and min(seen.values()) >= 5, seen


def test_killed_while_beginning(tmp_path: Path) -> None:
    seen = run("kill_a_beginning", tmp_path)
    assert 0 < seen["begun"] < seen["points"], seen


def test_stopped_and_killed_inside_a_transaction(tmp_path: Path) -> None:
    run("stop_inside", tmp_path)
