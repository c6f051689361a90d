"""A service of a tiny model, reached in this process: no port, no other process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cases import unchanged
from chats import chat_lm
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from serve.samples import a_workspace


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
