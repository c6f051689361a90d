"""Looking ahead at several steps gives what each of them would have found by itself."""

from __future__ import annotations

import pytest
import torch

from cases import records
from emendo.editors import gradient
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Weights
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig
from emendo.train.episodes import Episodes
from emendo.train.step import training_step


@pytest.fixture
def parts(tiny_llama: LM) -> tuple[Mend, TrunkCache, Episodes]:
    sites = find_sites(tiny_llama.model, last=2)
    torch.manual_seed(0)
    episodes = Episodes(tiny_llama, records(30), TrainConfig(batch=3, near=1, sibling=1))
    store = TrunkCache(Trunk(tiny_llama.model, sites), dtype=torch.float32)
    store.ensure(text for step in range(4) for episode in episodes.batch(step) for text in episode.texts())
    return Mend(sites, MendConfig(first_token=0.5)), store, episodes


def test_each_batch_gets_its_own_rows_and_what_must_stay_is_kept(
    parts: tuple[Mend, TrunkCache, Episodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "BUCKET_TOKENS", 40)  # several buckets, so that rows must be reordered
    editor, store, episodes = parts
    batches = [episodes.batch(step) for step in range(4)]
    for found, batch in zip(editor.look_ahead(store, batches), batches, strict=True):
        texts = [episode.edit for episode in batch]
        alone = edit_factors(store.trunk, editor.sites, texts, first_token=0.5)
        for name, factors in alone.items():
            got = found[name]
            assert got.examples == factors.examples
            torch.testing.assert_close(got.owner, factors.owner)
            torch.testing.assert_close(got.share, factors.share)
            torch.testing.assert_close(got.u, factors.u, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got.delta, factors.delta, rtol=1e-4, atol=1e-6)
        assert store.ensure_unedited(text for episode in batch for text in episode.locality) == 0


def test_a_step_is_the_same_with_and_without_looking_ahead(
    parts: tuple[Mend, TrunkCache, Episodes],
) -> None:
    editor, store, episodes = parts
    batches = [episodes.batch(step) for step in range(4)]
    gradients = []
    for found in (None, editor.look_ahead(store, batches)[2]):
        torch.manual_seed(0)
        fresh = Mend(editor.sites, editor.config)
        outcome = training_step(fresh, store, batches[2], Weights(0.2), found)
        assert outcome is not None
        gradients.append([p.grad for p in fresh.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
