"""Edits over HTTP: live when the call returns, gone when it says so."""

from __future__ import annotations

from typing import Any

import httpx2

from emendo.ledger.workspace import Workspace
from serve.samples import FACT, an_app, ask

MODEL = "tiny-llama"


async def answered(http: httpx2.AsyncClient, prompt: str, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0} | body
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_an_edit_is_live_and_taken_off(work: Workspace) -> None:
    prompt = FACT["prompt"]
    base = work.lm.generate(prompt, 6)

    async def calls(http: httpx2.AsyncClient) -> None:
        assert (await answered(http, prompt))["choices"][0]["text"] == base
        made = (await http.post("/v1/edits", json=FACT)).json()
        assert made["id"] == 1 and made["active"] == 1
        edited = await answered(http, prompt)
        with work.applied() as routed:
            assert edited["choices"][0]["text"] == routed.generate(prompt, 6)
        assert edited["choices"][0]["text"].startswith(" Oslo")
        assert [each["id"] for each in edited["emendo"]["edits"]] == [1]
        assert (await answered(http, prompt, edits="off"))["choices"][0]["text"] == base
        assert (await answered(http, "Hello, how are you?"))["emendo"]["edits"] == []
        assert (await http.post("/v1/why", json={"prompt": prompt})).json()["edit"] == 1
        assert (await http.delete("/v1/edits/1")).json()["active"] == 0
        assert (await answered(http, prompt))["choices"][0]["text"] == base

    ask(an_app(work), calls)
