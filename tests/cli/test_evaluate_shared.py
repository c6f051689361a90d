"""`emendo evaluate` in two processes, as `accelerate launch` starts them, on the gloo backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cli.samples import Emendo
from emendo.evaluate import intervals

TIMES = ("seconds_per_edit", "seconds_per_edit_in_batch", "cost")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    emendo_command: Emendo, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        intervals.bootstrap_interval.__kwdefaults__, "draws", intervals.DRAWS
    )  # as in a new process
    intervals._mean_bootstrap.cache_clear()
    ways = ("--no-generated", "--no-damage", "--batch", "2", "--limit", "5")
    options = ("evaluate", "--editor", "ft", "--model", model, "--set", "steps=1", "--data", facts, *ways)
    alone = emendo_command(*options, "--out", tmp_path / "alone", "--json").json
    team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    team |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "emendo", *map(str, options)]
    command += ["--out", str(tmp_path / "shared"), "--json"]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **team, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], [err for _, err in said]
    assert said[1][0] == ""  # the first speaks for all
    shared = json.loads(said[0][0])
    kept = emendo_command("evaluate", "show", tmp_path / "shared", "--json").json
    for figures in (alone, shared, kept):
        del figures["protocol"]["seconds_per_edit"]  # tests in one process time fewer edits
        for name in TIMES:
            figures.pop(name)
    assert shared == alone
    assert shared == kept
