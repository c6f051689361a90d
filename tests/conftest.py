"""Fixtures for every test: tiny models, their tokenizer, one thread, one seed, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from hypothesis import settings

from cases import build_lm, unchanged
from emendo.models.lm import LM

settings.register_profile("emendo", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("emendo")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On matrices this small, more threads cost time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
