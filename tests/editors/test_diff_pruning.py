"""Diff pruning: its gates against simulation, its descent against a plain one, and the sparsity of its edits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from cases import build_lm, records_for, unchanged
from emendo.editors.diff_pruning import DiffPruning, DiffPruningConfig, gate, open_probability
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import collate
from emendo.models.tokenization import to_texts

LOCATIONS = (-4.0, -1.0, 0.0, 1.5, 5.0)


@pytest.fixture(scope="module")
def exact() -> LM:
    return build_lm("gpt2", torch.float64)


def facts_of(lm: LM, n: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records_for(lm, n)]


# --------------------------------------------------------------------------------------------- the gates


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_expected_number_of_open_gates(location: float) -> None:
    """Against simulation, to within four standard errors."""
    torch.manual_seed(0)
    count = 100_000
    drawn = gate(torch.full((count,), location, dtype=torch.float64), torch.rand(count, dtype=torch.float64))
    open_share = float(open_probability(torch.tensor(location, dtype=torch.float64)))
    error = math.sqrt(open_share * (1 - open_share) / count)
    assert float(drawn.ne(0).double().mean()) == pytest.approx(open_share, abs=4 * error + 1e-4)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_mean_gate(location: float) -> None:
    """Against the integral of the definition."""

    def value(u: float) -> float:
        s = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + location)))
        return min(1.0, max(0.0, 3 * s - 1.5))

    torch.manual_seed(1)
    drawn = gate(
        torch.full((100_000,), location, dtype=torch.float64), torch.rand(100_000, dtype=torch.float64)
    )
    assert float(drawn.mean()) == pytest.approx(quad(value, 0, 1, limit=200)[0], abs=6e-3)


def test_gates_without_noise() -> None:
    """Shut from 0 down; wholly open from ``log 5`` up, where the sigmoid is 5/6."""
    at = torch.tensor([-3.0, 0.0, 1.0, math.log(5) + 1e-6, 9.0], dtype=torch.float64)
    middle = 3 / (1 + math.exp(-1)) - 1.5
    assert gate(at).tolist() == pytest.approx([0, 0, middle, 1, 1])


# ------------------------------------------------------------------------------------------- the descent


def plain(lm: LM, facts: list[Request], config: DiffPruningConfig) -> dict[str, Tensor]:
    """The change of each matrix, `[d_out, d_in]`, by a model whose weights are a function of the leaves."""
    texts = to_texts(lm, [(fact.prompt, fact.target) for fact in facts])
    sites, random = find_sites(lm.model), torch.Generator().manual_seed(config.seed)
    sizes = [(site.d_out, site.d_in) for site in sites]
    w = [torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    a = [torch.full(size, 5.0, dtype=torch.float64, requires_grad=True) for size in sizes]
    adam = torch.optim.Adam([{"params": w, "lr": config.lr}, {"params": a, "lr": config.gate_lr}])
    for _ in range(config.steps):
        weights = {}
        for site, own, at in zip(sites, w, a, strict=True):
            u = torch.rand(own.shape, generator=random, dtype=own.dtype).clamp(1e-4, 1 - 1e-4)
            z = (3 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + at))) - 1.5).clamp(0, 1)
            module = site.module(lm.model)
            weights[f"{site.name}.weight"] = module.weight + (z * own if not site.transposed else (z * own).T)
        losses = []
        for text in texts:
            batch = collate([text])
            logits = functional_call(lm.model, weights, kwargs={"input_ids": batch.input_ids}).logits[0]
            losses.append(cross_entropy(logits[batch.positions], batch.labels))
        count = sum((1 / (1 + torch.exp(-at))).sum() for at in a)
        adam.zero_grad()
        (torch.stack(losses).mean() + config.coefficient * count).backward()
        adam.step()
    gates = [(3 / (1 + torch.exp(-at)) - 1.5).clamp(0, 1) for at in a]
    return {site.name: (z * own).detach() for site, own, z in zip(sites, w, gates, strict=True)}


def test_it_is_plain_descent_on_entries_and_gates(exact: LM) -> None:
    facts = facts_of(exact, 2)
    config = DiffPruningConfig(coefficient=1e-4, steps=3, lr=1e-3, gate_lr=2.0, seed=4)
    with unchanged(exact.model):
        found = DiffPruning(find_sites(exact.model), config).together(exact, facts)
    for name, expected in plain(exact, facts, config).items():
        assert 0 < float(expected.eq(0).double().mean()) < 1
        torch.testing.assert_close(found[name].dense(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_larger_coefficient_leaves_fewer_entries(exact: LM) -> None:
    facts, sites, kept = facts_of(exact, 2), find_sites(exact.model), []
    for coefficient in (1e-6, 1e-3, 10.0):
        editor = DiffPruning(sites, DiffPruningConfig(coefficient, steps=12, lr=1e-2, gate_lr=1.0))
        each = editor.each(exact, facts)
        kept.append(sum(int(change.dense().ne(0).sum()) for change in each.values()))
    assert kept[0] > 1.2 * kept[1] > kept[2] == 0


def test_an_edit_does_not_depend_on_its_batch(exact: LM) -> None:
    facts = facts_of(exact, 2)
    editor = DiffPruning(find_sites(exact.model), DiffPruningConfig(steps=2, lr=1e-2))
    each, alone = editor.each(exact, facts), editor.edit(exact, facts[1].prompt, facts[1].target)
    for name, change in each.items():
        torch.testing.assert_close(change[1].dense(), alone.deltas[name].dense())
        assert not torch.equal(change[0].dense(), change[1].dense())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coefficient": 0.0}, "coefficient must be above 0, not 0.0"),
        ({"gate_lr": -1.0}, "gate_lr must be above 0, not -1.0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        DiffPruningConfig(**settings)
