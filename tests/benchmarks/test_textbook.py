"""emendo's training step against the textbook that the benchmarks measure it by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from textbook import Textbook

from cases import build_lm, records, unchanged
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Episode, Weights
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes
from emendo.train.step import training_step

RANK = 8


def _setting() -> tuple[LM, list[Episode], TrunkCache, Mend, Textbook]:
    """A tiny model in float64, some episodes, and two editors of the same weights, moved away from their start."""
    lm = build_lm("llama", torch.float64)
    sites = find_sites(lm.model, last=2)
    episodes = Episodes(lm, records(12), TrainConfig(batch=4, near=1, sibling=1)).batch(0)
    store = TrunkCache(Trunk(lm.model, sites), dtype=torch.float64)
    store.ensure(text for episode in episodes for text in episode.texts())
    ours = Mend(sites, MendConfig(rank=RANK, alpha=1e-2)).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 2e-3))
    plain = Textbook(lm.model, [site.name for site in sites], RANK).double()
    plain.load_state_dict(ours.state_dict())
    return lm, episodes, store, ours, plain


@pytest.mark.parametrize("training", [True, False])
def test_a_step_has_the_loss_and_the_gradient_of_the_textbook(training: bool) -> None:
    lm, episodes, store, ours, plain = _setting()
    with unchanged(lm.model):
        training_step(ours.train(), store, episodes[:1], Weights(0.3))  # moves the statistics
        plain.train().training_step(episodes[:1], 0.3)
        ours.zero_grad()
        plain.zero_grad()
        # The textbook's statistics move from edit to edit, ours with the batch: alike for one edit, or standing still.
        chosen = episodes[1:2] if training else episodes
        outcome = training_step(ours.train(training), store, chosen, Weights(0.3))
        losses = plain.train(training).training_step(chosen, 0.3)
    assert outcome is not None
    for name in ("loss", "edit", "locality"):
        mean = sum(getattr(one, name) for one in losses) / len(losses)
        found = getattr(outcome, name if name == "loss" else f"{name}_loss")
        assert found == pytest.approx(mean, rel=1e-8), name
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = theirs[name].grad
        assert parameter.grad is not None and expected is not None and expected.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12, msg=name)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-8, atol=1e-10, msg=name)


def test_an_edit_is_that_of_the_textbook() -> None:
    lm, episodes, store, ours, plain = _setting()
    with unchanged(lm.model):
        training_step(ours.train(), store, episodes, Weights(0.3))
        plain.load_state_dict(ours.state_dict())
        for episode in episodes:
            text = replace(episode.edit)
            with torch.no_grad():
                deltas = ours.eval()(ours.factors(store.trunk, [text]))
            edited = plain.eval().edit(text)
            for site in ours.sites:
                change = edited[f"{site.name}.weight"] - site.weight(lm.model)
                assert change.norm() > 0
                torch.testing.assert_close(deltas[site.name].dense()[0], change, rtol=1e-8, atol=1e-12)
