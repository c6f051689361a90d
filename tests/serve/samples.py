"""A tiny service and its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx2
from fastapi import FastAPI

from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.ledger.health import Limits
from emendo.ledger.probes import Probes
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.serve import create_app

T = TypeVar("T")

LOOSE = Limits(0, 0, *[1e9] * 7)
PROBES = Probes(
    (("A river in", ""), ("The capital of Gude is", "New Town")), "Bread is made from flour. " * 3
)
FACT = {"prompt": "The capital of Fosoba is", "target": "Oslo"}
OTHER = {"prompt": "Kel Madrun was born in", "target": "Rome"}


def a_workspace(lm: LM) -> Workspace:
    return Workspace.open(lm, limits=LOOSE, probes=PROBES, recheck_every=0)


def an_editor(lm: LM) -> FineTuning:
    sites = find_sites(lm.model)
    return FineTuning(sites, FineTuningConfig(lr=1e-2, steps=20))


def an_app(work: Workspace, **options: Any) -> FastAPI:
    return create_app(work, an_editor(work.lm), **options)


@asynccontextmanager
async def client(app: FastAPI, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an application that is running for as long as the client is open."""
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", **options) as opened,
    ):
        yield opened


def ask(app: FastAPI, work: Callable[[httpx2.AsyncClient], Awaitable[T]]) -> T:
    """Run some calls of a client."""

    async def run() -> T:
        async with client(app) as opened:
            return await work(opened)

    return asyncio.run(run())
