"""Fixtures for every test: tiny models, their tokenizer, one thread, one seed, no network."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
import typer.testing
from hypothesis import settings

from architectures import ALIKE
from cases import build_lm, unchanged
from emendo.models import _sampling
from emendo.models.lm import LM

settings.register_profile("emendo", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("emendo")

gc.set_threshold(100_000, 50, 100)  # each full collection walks all that torch and transformers made

# Otherwise every call of a command builds all commands anew, which takes longer than most of the calls themselves.
typer.testing._get_command = cache(typer.testing._get_command)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an architecture that is built like another one are slow ones."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("kind") in ALIKE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On matrices this small, more threads cost time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def short_passages() -> Iterator[None]:
    """Models write passages of eight tokens, not 32: sampling them was a third of each training run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sampling, "PASSAGE_TOKENS", 8)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed also asks every other device


@pytest.fixture
def tiny_llama() -> Iterator[LM]:
    """A fresh Llama (grouped queries, tied embeddings); the test fails if it leaves it changed."""
    lm = build_lm("llama")
    with unchanged(lm.model):
        yield lm


@pytest.fixture
def tiny_gpt2() -> Iterator[LM]:
    """A fresh GPT-2 (Conv1D matrices, learned positions); the test fails if it leaves it changed."""
    lm = build_lm("gpt2")
    with unchanged(lm.model):
        yield lm
