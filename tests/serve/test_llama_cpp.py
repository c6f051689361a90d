"""The router before a real llama.cpp server (from the package xllamacpp), with GGUF adapters of real edits."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
import pytest
import torch

from emendo import Edit, Editor, Request, load
from emendo.edits import Origin, to_gguf
from emendo.ledger import Ledger
from emendo.ledger.workspace import Workspace
from emendo.low_rank import LowRank
from emendo.models.loading import BUILT_IN
from emendo.serve.adapters import AdapterFolder
from emendo.serve.routing import Router
from emendo.serve.upstream import Upstream
from emendo.serve.upstream_engines import LlamaCpp
from serve.samples import LOOSE, PROBES, an_app, client

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]

MODEL = "smollm2-135m"
EDITS = {"The capital of Peru is": "Cusco", "Danielle Darrieux was born in": "Rome"}
OTHERS = ["The capital of Chile is", "Water is made of hydrogen and"]
SERVER = """
import sys, xllamacpp
model, *adapters = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = model, 2048, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # two would wait for each other
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path=path) for path in adapters]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(*adapters: Path) -> Iterator[str]:
    """The address of a server with some adapters."""
    package, file = BUILT_IN[MODEL]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    model = Path(spec.origin).with_name(file)
    command = [sys.executable, "-c", SERVER, str(model), *map(str, adapters)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), "the server did not start"
            yield address
        finally:
            process.kill()


def answers(address: str, prompts: list[str]) -> list[str]:
    """The answers of the engine alone."""
    with httpx2.Client(base_url=address, timeout=600) as http:
        bodies = [{"prompt": prompt, "max_tokens": 4, "temperature": 0} for prompt in prompts]
        return [http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    lm = load(MODEL)
    ledger = Ledger.create(tmp_path_factory.mktemp("ledger"), lm.fingerprint, lm.name)
    work = Workspace(lm, ledger, limits=LOOSE, probes=PROBES, recheck_every=0)
    editor = Editor.from_pretrained("mend-smollm2-135m")
    for prompt, target in EDITS.items():
        work.apply(work.make(editor, [Request(prompt, target)]), scope={})
    return work


def test_edits_are_answered_by_llama_cpp(work: Workspace, tmp_path: Path) -> None:
    folder = AdapterFolder(tmp_path, "gguf")
    state = Router(work.lm, work.ledger, None)._state("head")  # type: ignore[arg-type]
    names = [folder.write(work.lm, [state.part(id)]) for id in (1, 2)]
    prompts = [*EDITS, *OTHERS]
    with llama_cpp() as address:
        base = dict(zip(prompts, answers(address, prompts), strict=True))

    async def through(address: str) -> None:
        upstream = Upstream(address, LlamaCpp(), folder, work.lm.twin())
        async with client(an_app(work, backend=upstream), timeout=600) as http:

            async def ask(prompt: str, **more: Any) -> tuple[str, str]:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
                reply = await http.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                return reply.json()["choices"][0]["text"], reply.headers["X-Emendo-Edits"]

            for id, (prompt, target) in enumerate(EDITS.items(), 1):
                text, fired = await ask(prompt)
                assert text.startswith(f" {target}") and fired.startswith(f"{id};score=")
                assert await ask(prompt, edits="off") == (base[prompt], "none")
            for prompt in OTHERS:
                assert await ask(prompt) == (base[prompt], "none")
            together = await asyncio.gather(*[ask(prompt) for prompt in [*EDITS] * 2])
            for (text, _), target in zip(together, [*EDITS.values()] * 2, strict=True):
                assert text.startswith(f" {target}")
            message = {"role": "user", "content": "The capital of Peru is"}
            body = {"model": MODEL, "messages": [message], "max_tokens": 4, "stream": True, "temperature": 0}
            reply = await http.post("/v1/chat/completions", json=body)
            lines = [
                line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")
            ]
            said = "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines)
            assert said and reply.headers["X-Emendo-Edits"].startswith("1;")

    with llama_cpp(*[tmp_path / f"{name}.gguf" for name in names]) as address:
        asyncio.run(through(address))


def test_an_edit_that_llama_cpp_was_not_started_with_is_an_error(work: Workspace, tmp_path: Path) -> None:
    async def through(address: str) -> None:
        upstream = Upstream(address, LlamaCpp(), AdapterFolder(tmp_path, "gguf"), work.lm.twin())
        async with client(an_app(work, backend=upstream), timeout=600) as http:
            body = {"model": MODEL, "prompt": "The capital of Peru is", "max_tokens": 4}
            reply = await http.post("/v1/completions", json=body)
            assert reply.status_code == 502 and "is not loaded" in reply.json()["error"]["message"]
            body["edits"] = "off"
            assert (await http.post("/v1/completions", json=body)).status_code == 200

    with llama_cpp() as address:
        asyncio.run(through(address))


def test_all_kinds_of_matrices_change_llama_cpp_as_they_change_the_model(
    work: Workspace, tmp_path: Path
) -> None:
    lm = work.lm
    torch.manual_seed(0)
    deltas = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        for block in (10, 20):
            weight = lm.model.get_submodule(f"model.layers.{block}.{name}").weight
            delta = LowRank(torch.randn(len(weight), 4), torch.randn(4, weight.shape[1]))
            deltas[f"model.layers.{block}.{name}"] = delta.scale(0.6 * float(weight.norm() / delta.norm()))
    request = Request("The capital of Peru is", "Lima")
    edit = Edit(deltas, Origin(lm.fingerprint, lm.name, "made up", {}, (request,), "2026-01-01"))
    to_gguf(edit, lm, tmp_path / "edit.gguf")
    prompts = [*EDITS, *OTHERS]
    clean = lm.next_logits(prompts).log_softmax(-1)
    with edit.applied(lm):
        edited = lm.next_logits(prompts).log_softmax(-1)
    differences, effects = [], []
    with llama_cpp(tmp_path / "edit.gguf") as address, httpx2.Client(base_url=address, timeout=600) as http:
        for i, prompt in enumerate(prompts):
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 10}
            body["lora"] = [{"id": 0, "scale": 1.0}]
            reply = http.post("/v1/completions", json=body).json()
            for each in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                differences.append(abs(each["logprob"] - float(edited[i, each["id"]])))
                effects.append(abs(each["logprob"] - float(clean[i, each["id"]])))
    assert fmean(differences) < 0.2 * fmean(effects)
