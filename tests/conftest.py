"""Fixtures for every test: tiny models, their tokenizer, one thread, one seed, no network.

What takes seconds to import is imported by the fixtures: pytest-xdist's controller reads this file too, before any of
its workers starts, and runs no test.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import typer.testing
from hypothesis import settings

if TYPE_CHECKING:
    import torch

    from emendo.models.lm import LM
    from emendo.models.sites import Site
    from emendo.models.trunk import Trunk

settings.register_profile("emendo", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("emendo")

gc.set_threshold(100_000, 50, 100)  # each full collection walks all that torch and transformers made

# Otherwise every call of a command builds all commands anew, which takes longer than most of the calls themselves.
typer.testing._get_command = cache(typer.testing._get_command)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an architecture that is built like another one are slow ones."""
    from architectures import ALIKE, VARIANTS

    for item in items:
        call = getattr(item, "callspec", None)
        alike = ALIKE if "models" in item.path.parts else ALIKE | VARIANTS
        if call is not None and call.params.get("kind") in alike:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On matrices this small, more threads cost time."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def short_passages() -> Iterator[None]:
    """Passages of eight tokens, not 32, and two edits to time: each was a large share of a run."""
    from emendo.evaluate import run
    from emendo.models import _sampling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sampling, "PASSAGE_TOKENS", 8)
        patch.setattr(run, "SINGLE_EDITS", 2)
        yield


@pytest.fixture(autouse=True, scope="session")
def copies_are_alike() -> Iterator[None]:
    """What emendo finds out by running a model (which matrices run, from where a pass resumes) holds for its copies."""
    from architectures import ORIGINALS
    from emendo.models import sites, trunk

    ran: dict[object, tuple[Site, ...]] = {}
    resumed: dict[object, bool] = {}
    real_run, real_test = sites._that_run, trunk.Trunk._test

    def that_run(model: torch.nn.Module, chosen: Sequence[Site]) -> tuple[Site, ...]:
        if (original := ORIGINALS.get(model)) is None:
            return real_run(model, chosen)
        key = (id(original), tuple(chosen))
        if key not in ran:
            ran[key] = real_run(model, chosen)
        return ran[key]

    def test(self: Trunk) -> bool:
        if (original := ORIGINALS.get(self.model)) is None:
            return real_test(self)
        key = (id(original), self.model.dtype, self.stack, self.block, tuple(self.sites))
        if key not in resumed:
            resumed[key] = real_test(self)
        return resumed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "_that_run", that_run)
        patch.setattr(trunk.Trunk, "_test", test)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed also asks every other device


@pytest.fixture
def tiny_llama() -> Iterator[LM]:
    """A fresh Llama (grouped queries, tied embeddings); the test fails if it leaves it changed."""
    from cases import build_lm, unchanged

    lm = build_lm("llama")
    with unchanged(lm.model):
        yield lm


@pytest.fixture
def tiny_gpt2() -> Iterator[LM]:
    """A fresh GPT-2 (Conv1D matrices, learned positions); the test fails if it leaves it changed."""
    from cases import build_lm, unchanged

    lm = build_lm("gpt2")
    with unchanged(lm.model):
        yield lm
