"""`emendo serve` as a command: what it refuses before it loads a model, and how a process starts and ends.

What the server answers is tested in tests/serve.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from cli.samples import Emendo
from emendo.cli.serve import _listening
from emendo.ledger import Ledger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--upstream", "http://127.0.0.1:1", "--engine", "ollama"), "not one of vllm, sglang, llama.cpp"),
        (("--upstream", "127.0.0.1:1"), "is not the address of an engine"),
        (("--max-rank", 16), "belong to --upstream"),
        (("--host", "0.0.0.0"), "tokens for asking and for editing are required"),
        (("--host", "192.0.2.1"), "tokens for asking and for editing are required"),
        (("--port", 65_536), "less than or equal to 65535"),
    ],
)
def test_options_that_do_not_fit(
    emendo_command: Emendo, options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EMENDO_ASK_TOKEN", "EMENDO_EDIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    said = emendo_command("serve", "no-such-model", "--port", 0, *options, code=2)
    assert message in said.err and said.out == ""


def test_a_port_in_use_is_told_before_the_model_is_loaded(emendo_command: Emendo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = emendo_command("serve", "no-such-model", "--port", port, code=2)
    assert said.err == f"Error: Port {port} of 127.0.0.1 cannot be used: Address already in use.\n"


def test_each_part_of_an_answer_is_sent_at_once() -> None:
    """Otherwise a part waits for the receipt of the one before, which a client may delay by 40 ms."""
    found: list[int] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect(listener: socket.socket) -> None:
        async with await asyncio.start_server(connected, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()

    with _listening("127.0.0.1", 0) as listener:
        asyncio.run(connect(listener))
    assert found and all(found)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_until_a_signal(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    own = shutil.copytree(model, tmp_path / "model")  # which names its ledger
    words = [sys.executable, "-m", "emendo", "serve", str(own), *"--port 0 --editor ft --name tiny".split()]
    env = {**os.environ, "EMENDO_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            with httpx2.Client(base_url=found[0], timeout=60, trust_env=False) as http:
                assert http.get("/health").json() == {"status": "ok"}
                assert http.get("/ready").json() == {"ready": True}
                body = {"prompt": "The capital of Bada is", "target": "Oslo", "force": True}
                made = http.post("/v1/edits", json=body).json()
                body = {"model": "tiny", "prompt": body["prompt"], "max_tokens": 3, "temperature": 0}
                reply = http.post("/v1/completions", json=body)
                assert reply.headers["X-Emendo-Edits"].startswith(f"{made['id']};score=")
                process.send_signal(number)
                said += process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "Traceback" not in said and '"path": "/v1/completions", "status": 200' in said
    assert Ledger.open(own / "emendo-ledger").head.active == (made["id"],)
