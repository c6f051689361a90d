"""The engine's queue: bounded, fair to those who hang up, and not ended by one request's error."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from emendo.errors import MismatchError, ModelError, RequestError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.serve import Bounds, Settings
from emendo.serve._batch import Batch
from emendo.serve._worker import Worker
from emendo.serve.backend import Ask, BusyError, InForce, Part, Piece
from emendo.serve.engine import Engine
from memory.test_bank import FACTS, an_edit
from serve.samples import MODEL, PLAIN, ask, client, completed

OFF = InForce(0)


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker("test")
    yield found
    found.close()


async def text_of(engine: Engine, prompt: str, tokens: int, force: InForce = OFF) -> str:
    return "".join([piece.text async for piece in engine.answer(Ask(prompt, max_tokens=tokens), force)])


def test_requests_that_come_later_join_the_batch(lm: LM, worker: Worker) -> None:
    engine = Engine(lm, worker)
    sizes: list[int] = []

    async def run() -> None:
        first = engine.answer(Ask(PLAIN, max_tokens=12, stream=True), OFF)
        async with aclosing(first):
            pieces = [await anext(first)]
            later = asyncio.create_task(text_of(engine, FACTS[0][0], 3))
            while not later.done():
                sizes.append(len(engine._batch.rows))
                pieces.append(await anext(first))
            pieces += [piece async for piece in first]
        assert await later == lm.generate(FACTS[0][0], 3)
        assert "".join(piece.text for piece in pieces) == lm.generate(PLAIN, 12)

    asyncio.run(run())
    assert 2 in sizes


def test_the_queue_and_the_batch_are_bounded(lm: LM, worker: Worker) -> None:
    bounds = Bounds(rows=2, tokens=40, waiting=3)
    engine = Engine(lm, worker, bounds)
    most: list[tuple[int, int]] = []
    step = Batch.step

    def watched(self: Batch) -> list[Piece]:
        most.append((len(self.rows), sum(row.size for row in self.rows)))
        return step(self)

    async def run() -> list[Any]:
        gate = threading.Event()
        worker.submit(gate.wait)  # nothing is admitted until all have come
        asked = [asyncio.create_task(text_of(engine, PLAIN, 6)) for _ in range(6)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "step", watched)
        found = asyncio.run(run())
    refused = [each for each in found if isinstance(each, BusyError)]
    assert len(refused) == 3 and found.count(lm.generate(PLAIN, 6)) == 3
    assert max(rows for rows, _ in most) <= 2 and max(tokens for _, tokens in most) <= 40


def test_a_client_that_hangs_up_frees_its_row(lm: LM, worker: Worker) -> None:
    engine = Engine(lm, worker)

    async def run() -> None:
        gone = engine.answer(Ask(PLAIN, max_tokens=80, stream=True), OFF)
        await anext(gone)
        await gone.aclose()
        assert await text_of(engine, FACTS[0][0], 3) == lm.generate(FACTS[0][0], 3)
        assert len(engine._batch.rows) <= 1

    asyncio.run(run())


def test_an_error_of_one_request_is_its_own(lm: LM, worker: Worker) -> None:
    engine = Engine(lm, worker)
    edit = an_edit(lm, FACTS[0])
    name = next(iter(edit.deltas))
    odd = replace(edit, deltas={name: LowRank(edit.deltas[name].left[1:], edit.deltas[name].right)})

    async def run() -> list[Any]:
        return await asyncio.gather(
            text_of(engine, PLAIN, 3),
            text_of(engine, PLAIN, 3, InForce(1, (Part("odd", odd, (1,)),))),
            text_of(engine, "long " * 200, 3),
            text_of(engine, " ", 3),
            return_exceptions=True,
        )

    good, *bad = asyncio.run(run())
    assert good == lm.generate(PLAIN, 3)
    assert [type(each) for each in bad] == [MismatchError, RequestError, RequestError]


def test_a_failed_step_is_told_and_the_engine_goes_on(
    lm: LM, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lm, worker)
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(text_of(engine, PLAIN, 3))
    monkeypatch.setattr(Batch, "step", step)
    assert asyncio.run(text_of(engine, PLAIN, 3)) == lm.generate(PLAIN, 3)


def test_only_decoders_are_served(worker: Worker) -> None:
    from cases import build_lm

    with pytest.raises(ModelError, match="Only decoders"):
        Engine(build_lm("t5"), worker)


def test_an_answer_that_takes_too_long_is_given_up(work: Any, serve: Any) -> None:
    app = serve(work, settings=Settings(timeout=1e-4))
    body = {"model": MODEL, "prompt": PLAIN, "max_tokens": 50}
    reply = ask(app, lambda http: http.post("/v1/completions", json=body))
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"


def test_a_full_queue_is_429(work: Any, serve: Any) -> None:
    app = serve(work, bounds=Bounds(rows=1, waiting=1))

    async def run() -> list[int]:
        async with client(app) as http:
            body = {"model": MODEL, "prompt": PLAIN, "max_tokens": 20}
            replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(8)))
            assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 429)
            return [reply.status_code for reply in replies]

    found = asyncio.run(run())
    assert set(found) == {200, 429}


@pytest.mark.parametrize("stream", [False, True])
def test_a_hung_up_connection_ends_the_work(work: Any, serve: Any, stream: bool) -> None:
    app = serve(work)
    body = json.dumps({"model": MODEL, "prompt": PLAIN, "max_tokens": 80, "stream": stream}).encode()
    engine = app.state.service.backend

    async def run() -> None:
        async def messages() -> AsyncIterator[dict[str, Any]]:
            yield {"type": "http.request", "body": body, "more_body": False}
            while not engine.figures()["running"]:
                await asyncio.sleep(0.001)
            yield {"type": "http.disconnect"}

        incoming = messages()

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "state": {},
        }
        await app(scope, incoming.__anext__, send)
        while engine.figures()["running"]:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert ask(app, lambda http: completed(http, PLAIN))["choices"][0]["text"] == work.lm.generate(PLAIN, 6)
