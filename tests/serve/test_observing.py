"""What operators see: ids, lines of JSON, figures, and whether the server answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import httpx2
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from emendo.errors import StorageError
from emendo.ledger import Ledger
from emendo.ledger.workspace import Workspace
from emendo.serve.observing import JsonLines
from serve.samples import FACT, MODEL, PLAIN, ask, completed

Serve = Callable[..., FastAPI]


def test_figures(work: Workspace, serve: Serve) -> None:
    async def calls(http: httpx2.AsyncClient) -> str:
        await http.post("/v1/edits", json=FACT)
        for prompt in (FACT["prompt"], PLAIN, PLAIN):
            await completed(http, prompt)
        question = {"prompt": FACT["prompt"], "model": MODEL, "max_tokens": 2}
        await http.post("/page/ask", json=question)
        await http.get("/nowhere")
        await http.delete("/v1/edits/1")
        return (await http.get("/metrics")).text

    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(ask(serve(work), calls))
        for sample in family.samples
    }
    assert found["emendo_requests_total", "/v1/completions", "200"] == 3
    assert found["emendo_requests_total", "none", "404"] == 1
    assert found["emendo_requests_total", "/page/ask", "200"] == 1
    assert found["emendo_answers_total", "edit"] == 2  # the page asks the base model, too
    assert found["emendo_answers_total", "base"] == 3
    assert found["emendo_tokens_total", "generated"] == 3 * 6 + 2 * 2
    assert found["emendo_steps_total", "apply"] == 1
    assert found["emendo_active_edits",] == 0 and found["emendo_operation",] == 2
    assert found["emendo_engine_waiting",] == 0


def test_each_request_has_an_id_and_a_line(
    work: Workspace, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(JsonLines())

    async def calls(http: httpx2.AsyncClient) -> list[str]:
        body = {"model": MODEL, "prompt": PLAIN, "max_tokens": 1}
        sent = [{"X-Request-Id": "abc-1"}, {"X-Request-Id": 'b"ad\t'}, {}]
        replies = [await http.post("/v1/completions", json=body, headers=each) for each in sent]
        replies.append(await http.post("/page/ask", json=body))
        return [reply.headers["x-request-id"] for reply in replies]

    with caplog.at_level(logging.INFO, "emendo.serve"):
        ids = ask(serve(work), calls)
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    assert ids[0] == "abc-1" and len(ids[1]) == len(ids[2]) == len(ids[3]) == 32
    assert [line["request_id"] for line in lines] == ids
    assert (lines[0]["status"], lines[0]["path"], lines[0]["edits"]) == (200, "/v1/completions", "none")
    assert (lines[3]["path"], lines[3]["edits"]) == ("/page/ask", "none")


def test_it_is_not_ready_without_its_ledger(
    work: Workspace, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve(work)
    assert ask(app, lambda http: http.get("/ready")).json() == {"ready": True}

    def lost(self: Ledger) -> None:
        raise StorageError("The ledger is gone.")

    monkeypatch.setattr(Ledger, "head", property(lost))
    assert ask(app, lambda http: http.get("/ready")).status_code == 503
    body = {"model": MODEL, "prompt": PLAIN}
    found = ask(app, lambda http: http.post("/v1/completions", json=body))
    assert (found.status_code, found.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert ask(app, lambda http: http.get("/health")).json() == {"status": "ok"}
