"""A tiny service and its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx2
from fastapi import FastAPI
from openai import AsyncOpenAI

from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.ledger.health import Limits
from emendo.ledger.probes import Probes
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.serve import Settings, create_app

T = TypeVar("T")

MODEL = "tiny-llama"
LOOSE = Limits(0, 0, *[1e9] * 7)
PROBES = Probes(
    (("A river in", ""), ("The capital of Gude is", "New Town")), "Bread is made from flour. " * 3
)
FACT = {"prompt": "The capital of Fosoba is", "target": "Oslo"}
OTHER = {"prompt": "Kel Madrun was born in", "target": "Rome"}
PLAIN = "Hello, how are you?"
ADDRESS = "http://127.0.0.1"


def a_workspace(lm: LM, limits: Limits = LOOSE) -> Workspace:
    return Workspace.open(lm, limits=limits, probes=PROBES, recheck_every=0)


def an_editor(lm: LM) -> FineTuning:
    return FineTuning(find_sites(lm.model), FineTuningConfig(lr=1e-2, steps=20))


def an_app(work: Workspace, **options: Any) -> FastAPI:
    options.setdefault("settings", Settings(edits_per_minute=10**6))
    return create_app(work, an_editor(work.lm), **options)


@asynccontextmanager
async def client(app: FastAPI, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an application."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=ADDRESS, **options) as opened:
        yield opened


def ask(app: FastAPI, work: Callable[[httpx2.AsyncClient], Awaitable[T]], **options: Any) -> T:
    """Run some calls of a client; the application goes on."""

    async def run() -> T:
        async with client(app, **options) as opened:
            return await work(opened)

    return asyncio.run(run())


def ask_openai(app: FastAPI, work: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
    """Run some calls of OpenAI's client."""

    async def run(http: httpx2.AsyncClient) -> T:
        return await work(
            AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none", http_client=http, max_retries=0)
        )

    return ask(app, run)


async def completed(http: httpx2.AsyncClient, prompt: str | list[str], **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0} | body
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()
