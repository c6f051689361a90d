"""The decoupled, batched step against the textbook one: full logits, dense weights, end-to-end autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from cases import build_lm, records_for, unchanged
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Episode, Outcome, Weights
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes
from emendo.train.step import training_step, validation_step

C_EDIT = 0.3


def _editor(lm: LM, **config: Any) -> Mend:
    """An editor that is no longer at its start: every parameter and every statistic moved."""
    torch.manual_seed(3)
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=8, alpha=1e-2, **config)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.05 if parameter.dim() > 1 else 2e-3))
    return editor


def _setting(
    kind: str, count: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[LM, list[Episode], TrunkCache]:
    lm = build_lm(kind, dtype)
    config = TrainConfig(batch=count, near=1, sibling=1, unrelated=1)
    episodes = Episodes(lm, records_for(lm, 12), config).batch(0)
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model, last=2)), dtype=dtype)
    store.ensure(text for episode in episodes for text in episode.texts())
    return lm, episodes, store


def _logits(model: Any, weights: dict[str, Tensor], text: Text) -> Tensor:
    """Full logits of one text, of those positions that predict its answer."""
    output = functional_call(model, weights, (torch.tensor([text.inputs]),), {"use_cache": False})
    return output.logits[0, text.start - 1 :]


def _factors_of(lm: LM, editor: Mend, text: Text) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every site by plain backpropagation through the whole model."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            kept[name] = (args[0].detach()[0], output.requires_grad_())
            return output

        return hook

    handles = [site.module(lm.model).register_forward_hook(keep(site.name)) for site in editor.sites]
    loss = F.cross_entropy(_logits(lm.model, {}, text), torch.tensor(text.labels))
    names = list(kept)
    gradients = torch.autograd.grad(loss, [kept[name][1] for name in names])
    for handle in handles:
        handle.remove()
    return {name: (kept[name][0], g[0]) for name, g in zip(names, gradients, strict=True)}


def _textbook(lm: LM, editor: Mend, episodes: list[Episode]) -> Tensor:
    """MEND's Algorithm 1 with nothing saved: one text after the other, under dense changed weights."""
    each = [_factors_of(lm, editor, episode.edit) for episode in episodes]
    factors = {}
    for site in editor.sites:
        u, delta = zip(*(one[site.name] for one in each), strict=True)
        owner = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(u)])
        used = torch.cat(u).ne(0).any(-1) & torch.cat(delta).ne(0).any(-1)
        factors[site.name] = Factors(torch.cat(u)[used], torch.cat(delta)[used], owner[used], len(episodes))
    deltas = editor(factors)
    total = torch.zeros((), dtype=torch.float64)
    for i, episode in enumerate(episodes):
        weights = {}
        for site in editor.sites:
            dense = deltas[site.name].dense()[i]
            parameter = f"{site.name}.weight"
            weights[parameter] = lm.model.get_parameter(parameter) + (dense.T if site.transposed else dense)
        for text in (episode.edit, episode.paraphrase):
            nll = F.cross_entropy(_logits(lm.model, weights, text), torch.tensor(text.labels))
            total = total + C_EDIT / 2 * nll
        for text in episode.locality:
            before = _logits(lm.model, {}, text).log_softmax(-1)
            after = _logits(lm.model, weights, text).log_softmax(-1)
            kl = F.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
            total = total + kl / len(episode.locality)
    return total / len(episodes)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_step_has_the_gradient_of_the_textbook(kind: str) -> None:
    lm, episodes, store = _setting(kind)
    editor, plain = _editor(lm).train(), _editor(lm).train()
    with unchanged(lm.model):
        outcome = training_step(editor, store, episodes, Weights(C_EDIT))
    loss = _textbook(lm, plain, episodes)
    loss.backward()
    assert outcome is not None
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-9)
    for (name, ours), theirs in zip(editor.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is not None, name
        assert theirs.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("config", [{}, {"shared": False}, {"factors": "u"}, {"norm": False}])
def test_a_batch_is_the_mean_of_its_episodes(config: dict[str, Any]) -> None:
    lm, episodes, store = _setting("llama", 4)
    together, alone = _editor(lm, **config).eval(), _editor(lm, **config).eval()
    outcome = training_step(together, store, episodes, Weights(C_EDIT))
    parts = [training_step(alone, store, [episode], Weights(C_EDIT)) for episode in episodes]
    assert outcome is not None
    for name in Outcome.__dataclass_fields__:
        mean = sum(getattr(part, name) for part in parts) / len(parts)
        assert getattr(outcome, name) == pytest.approx(mean, rel=1e-9), name
    for (name, ours), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad * len(episodes), theirs.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_scores_are_those_of_the_edited_model() -> None:
    lm, episodes, store = _setting("llama", 4)
    editor = _editor(lm).eval()
    outcome = validation_step(editor, store, episodes, Weights(C_EDIT))
    success, kept = [], []
    for episode in episodes:
        ids = torch.tensor([episode.edit.ids])
        text = lm.tokenizer.decode(ids[0, : episode.edit.start])
        edit = editor.edit(lm, text, lm.tokenizer.decode(ids[0, episode.edit.start :]))
        assert edit.origin.requests[0].prompt == text
        with edit.applied(lm):
            right = _logits(lm.model, {}, episode.edit).argmax(-1) == torch.tensor(episode.edit.labels)
            after = [_logits(lm.model, {}, text).argmax(-1) for text in episode.locality]
        before = [_logits(lm.model, {}, text).argmax(-1) for text in episode.locality]
        success.append(float(right.all()))
        kept += [float(a.equal(b)) for a, b in zip(after, before, strict=True)]
    assert outcome.success == pytest.approx(sum(success) / len(success))
    assert outcome.locality == pytest.approx(sum(kept) / len(kept))


def test_validation_changes_nothing() -> None:
    lm, episodes, store = _setting("llama")
    editor = _editor(lm).train()
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    first = validation_step(editor, store, episodes, Weights(C_EDIT))
    assert validation_step(editor, store, episodes, Weights(C_EDIT)) == first
    assert editor.training
    assert all(tensor.equal(before[name]) for name, tensor in editor.state_dict().items())
    assert all(parameter.grad is None for parameter in editor.parameters())


def test_training_takes_in_the_statistics() -> None:
    lm, episodes, store = _setting("llama")
    editor = _editor(lm).train()
    training_step(editor, store, episodes, Weights(C_EDIT))
    counts = [float(buffer) for name, buffer in editor.named_buffers() if name.endswith("count")]
    assert counts and all(count > 0 for count in counts)


def test_factors_that_are_not_finite_reach_nothing() -> None:
    lm, episodes, store = _setting("llama")
    editor = _editor(lm).train()
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    with torch.no_grad():
        for chunk in store.hidden.chunks:
            chunk.fill_(float("nan"))
    assert training_step(editor, store, episodes, Weights(C_EDIT)) is None
    assert all(tensor.equal(before[name]) for name, tensor in editor.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "t5", "bart", "bert"])
def test_a_half_precision_model_gives_the_gradient_of_the_exact_one(kind: str) -> None:
    """To the format's precision: the editor, the changes and the losses are in float32."""
    half, episodes, store = _setting(kind, dtype=torch.bfloat16)
    exact, same, reference = _setting(kind)
    assert same == episodes
    exact.model.load_state_dict(half.model.state_dict())
    reference = TrunkCache(Trunk(exact.model, find_sites(exact.model, last=2)), dtype=torch.float64)
    reference.ensure(text for episode in episodes for text in episode.texts())
    ours, theirs = _editor(half).float().train(), _editor(exact).train()
    found = training_step(ours, store, episodes, Weights(C_EDIT))
    wanted = training_step(theirs, reference, episodes, Weights(C_EDIT))
    assert found is not None
    assert wanted is not None
    assert found.loss == pytest.approx(wanted.loss, rel=0.05)
    gradients = [
        torch.cat([p.grad.double().flatten() for p in editor.parameters() if p.grad is not None])
        for editor in (ours, theirs)
    ]
    assert F.cosine_similarity(*gradients, dim=0) > 0.95
    assert gradients[0].norm() / gradients[1].norm() == pytest.approx(1, rel=0.15)
