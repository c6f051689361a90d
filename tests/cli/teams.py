"""Several processes that share a command, as `torchrun` starts them, on the gloo backend."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def start(size: int, *options: object, cache: object = None) -> list[subprocess.Popen[str]]:
    """Start a command in several processes; the first is the main one."""
    team = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    team |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    team |= {} if cache is None else {"EMENDO_CACHE": str(cache)}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "emendo", *map(str, options)],
            env={**os.environ, **team, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(running: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What each has printed on both of its streams, once all have ended well."""
    said = [process.communicate(timeout=300) for process in running]
    assert not any(process.returncode for process in running), [err for _, err in said]
    return said


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
