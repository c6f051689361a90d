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

from cases import build_lm, unchanged
from emendo.models import _sampling
from emendo.models.lm import LM

settings.register_profile("emendo", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("emendo")

# Otherwise every call of a command builds all commands anew, which takes longer than most of the calls themselves.
typer.testing._get_command = cache(typer.testing._get_command)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later collection of garbage."""
    gc.freeze()


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
