"""The LSTM meta-learner: its update one weight at a time, its gradients by autograd, and how it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cases import build_lm, plain_logits, records_for, unchanged
from emendo.editors.meta_lstm import MetaLstm, MetaLstmConfig, preprocessed
from emendo.editors.objective import Episode, Weights
from emendo.edits.edit import Request
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig, train
from emendo.train.episodes import Episodes
from emendo.train.step import training_step, validation_step

ONE = (Site("w", 3, 2, "blocks", 0, attention=False, transposed=False),)


def make(sites: tuple[Site, ...], std: float = 0.3, **config: Any) -> MetaLstm:
    """An editor in float64 that is no longer at its start."""
    torch.manual_seed(0)
    editor = MetaLstm(sites, MetaLstmConfig(**{"hidden": 3, "alpha": 0.05, **config})).double()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter += std * torch.randn_like(parameter)
    return editor


def pre(x: float) -> list[float]:
    if abs(x) >= math.exp(-10):
        return [math.log(abs(x)) / 10, math.copysign(1.0, x)]
    return [-1.0, math.exp(10) * x]


def gate(layer: nn.Linear, inputs: Sequence[float]) -> float:
    weights = layer.weight[0].tolist()
    total = sum(w * x for w, x in zip(weights, inputs, strict=True)) + float(layer.bias)
    return 1 / (1 + math.exp(-total))


def one_weight(editor: MetaLstm, gradients: Sequence[float], losses: Sequence[float], weight: float) -> float:
    """The reference: one weight, step by step, with torch's own LSTM cell and the equations of the paper."""
    cell = nn.LSTMCell(4, editor.config.hidden).double()
    cell.load_state_dict(editor.reader.state_dict())
    h = c = torch.zeros(1, editor.config.hidden, dtype=torch.float64)
    size = kept = 0.0
    theta = weight
    for g, loss in zip(gradients, losses, strict=True):
        h, c = cell(torch.tensor([pre(g) + pre(loss)], dtype=torch.float64), (h, c))
        size = gate(editor.size, [*h[0].tolist(), theta, size])
        kept = gate(editor.kept, [*h[0].tolist(), theta, kept])
        if editor.config.cell == "weights":
            theta = kept * theta - size * g
        else:
            theta = weight + kept * (theta - weight) - size * g
    return theta - weight


@pytest.mark.parametrize("cell", ["change", "weights"])
@torch.no_grad()
def test_each_weight_moves_as_an_lstm_says(cell: str) -> None:
    editor = make(ONE, cell=cell)
    gradients = torch.randn(3, 6, dtype=torch.float64)
    gradients[:, :3] *= torch.tensor([1e-3, 1e-5, 0.0], dtype=torch.float64)
    losses, weights = torch.tensor([4.0, 0.3, 1e-6], dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = editor.run(gradients, losses, weights)
    expected = [
        one_weight(editor, gradients[:, i].tolist(), losses.tolist(), float(weights[i])) for i in range(6)
    ]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-10, atol=1e-12)
    assert len({round(x, 6) for x in expected}) == 6


@torch.no_grad()
def test_untrained_it_takes_plain_steps() -> None:
    for cell, alpha in (("change", 0.1), ("weights", 0.02)):
        editor = make(ONE, std=0.0, alpha=alpha, keep=0.9, cell=cell)
        g, w = torch.randn(2, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        change = editor.run(g, torch.ones(2, dtype=torch.float64), w)
        shrunk = 0.9 * (0.9 * w) - w if cell == "weights" else 0.0
        torch.testing.assert_close(change, shrunk - alpha * (0.9 * g[0] + g[1]))


def test_sizes_below_the_smallest_are_linear() -> None:
    x = torch.tensor([0.0, 1e-6, -1e-6, 1.0, -math.e], dtype=torch.float64)
    expected = torch.tensor([pre(value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(preprocessed(x), expected)


# ------------------------------------------------------------------------------------- whole edits


def dense_gradients(lm: LM, text: Text, sites: tuple[Site, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a text and its gradient by autograd through the whole model."""
    with torch.enable_grad():
        weights = [site.module(lm.model).weight.requires_grad_() for site in sites]
        loss = cross_entropy(plain_logits(lm.model, collate([text])), torch.tensor(text.labels))
        found = torch.autograd.grad(loss, weights)  # type: ignore[arg-type]
    return loss.detach(), {
        site.name: g.T if site.transposed else g for site, g in zip(sites, found, strict=True)
    }


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
@torch.no_grad()
def test_an_edit_takes_its_gradients_at_the_changed_weights(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    sites = find_sites(lm.model, last=1)
    editor = make(sites, inner_steps=3)
    facts = [Request(record.prompt, record.target) for record in records_for(lm, 2)]
    with unchanged(lm.model):
        each = editor.each(lm, facts)
    for index, text in enumerate(to_texts(lm, [fact.pair for fact in facts])):
        plain = LM(copy.deepcopy(lm.model), lm.tokenizer)
        losses, gradients = [], []
        for _ in range(3):
            loss, found = dense_gradients(plain, text, sites)
            losses.append(loss)
            gradients.append(found)
            for site in sites:
                rows = torch.stack([g[site.name].flatten() for g in gradients])
                start = site.weight(lm.model)
                change = editor.run(rows, torch.stack(losses), start.flatten()).view(start.shape)
                site.weight(plain.model).copy_(start + change)
        for site in sites:
            change = site.weight(plain.model) - site.weight(lm.model)
            torch.testing.assert_close(each[site.name].dense()[index], change, rtol=1e-6, atol=1e-9)


def episodes_of(lm: LM, sites: tuple[Site, ...], dtype: torch.dtype) -> tuple[TrunkCache, list[Episode]]:
    batch = Episodes(lm, records_for(lm, 12), TrainConfig(batch=3, near=1, sibling=1)).batch(0)
    store = TrunkCache(Trunk(lm.model, sites), dtype=dtype)
    store.ensure(text for episode in batch for text in episode.texts())
    return store, batch


def test_the_gradient_of_a_step_equals_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradients of all steps held, which count as constants; in blocks of some rows."""
    monkeypatch.setattr("emendo.editors.meta_lstm._BLOCK", 999)
    lm = build_lm("gpt2", torch.float64)
    sites = find_sites(lm.model, last=1)
    store, batch = episodes_of(lm, sites, torch.float64)
    editor = make(sites, 0.1)
    texts = [episode.edit for episode in batch]
    steps = editor._steps(store.trunk, texts, store.gather(texts), editor._weights(store.trunk))
    assert len(steps) == 2
    monkeypatch.setattr(editor, "_steps", lambda *_: steps)
    with unchanged(lm.model):
        assert training_step(editor, store, batch, Weights(0.3)) is not None
    moves = []
    for parameter in editor.parameters():
        assert parameter.grad is not None
        noise = torch.randn_like(parameter)
        moves.append(1e-6 * (noise / noise.norm() + parameter.grad / (parameter.grad.norm() + 1e-30)))
    losses = []
    for factor in (1, -2):
        with torch.no_grad():
            for parameter, move in zip(editor.parameters(), moves, strict=True):
                parameter += factor * move
        outcome = validation_step(editor, store, batch, Weights(0.3))
        assert outcome is not None
        losses.append(outcome.loss)
    expected = sum(float((p.grad * move).sum()) for p, move in zip(editor.parameters(), moves, strict=True))  # type: ignore[operator]
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-8


@pytest.mark.slow
def test_it_learns_to_edit(tiny_llama: LM) -> None:
    sites = find_sites(tiny_llama.model, last=1)
    store, batch = episodes_of(tiny_llama, sites, torch.float32)
    torch.manual_seed(0)
    editor = MetaLstm(sites, MetaLstmConfig(hidden=3, alpha=0.01))
    before = validation_step(editor, store, batch, Weights(0.3))
    config = TrainConfig(steps=6, batch=3, lr=0.4, warmup=0, near=1, sibling=0)
    train(tiny_llama, editor, records_for(tiny_llama, 12), [], config)
    after = validation_step(editor, store, batch, Weights(0.3))
    assert before is not None
    assert after is not None
    assert after.loss < 0.9 * before.loss
