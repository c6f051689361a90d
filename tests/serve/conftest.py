"""Services of a tiny model, reached in this process: no port, no other process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from cases import unchanged
from chats import chat_lm
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from serve.samples import FACT, OTHER, a_workspace, an_app, ask


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lm() -> Iterator[LM]:
    found = chat_lm().reading(chat=False)
    with unchanged(found.model):
        yield found


@pytest.fixture
def work(lm: LM) -> Workspace:
    return a_workspace(lm)


@pytest.fixture
def serve() -> Iterator[Callable[..., FastAPI]]:
    """Makes applications of a workspace that are closed after the test."""
    made: list[FastAPI] = []

    def make(work: Workspace, **options: object) -> FastAPI:
        made.append(an_app(work, **options))
        return made[-1]

    yield make
    for app in made:
        asyncio.run(app.state.service.close())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, Workspace]]:
    """A service with edits 1 and 2, for tests that only ask; and its workspace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMENDO_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("EMENDO_CACHE", str(tmp_path_factory.mktemp("cache")))
        work = a_workspace(chat_lm().reading(chat=False))
        app = an_app(work)
        with unchanged(work.lm.model):
            for fact in (FACT, OTHER):
                assert ask(app, lambda http, fact=fact: http.post("/v1/edits", json=fact)).status_code == 200
            work.ledger.tag("first", 1)
            yield app, work
        asyncio.run(app.state.service.close())
