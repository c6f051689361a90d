"""The optimisers of changes against PyTorch's, and the settings that come with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import build_lm
from emendo.editors import descent as optimizers
from emendo.editors.descent import OPTIMIZERS, default_rate, update
from emendo.low_rank import LowRank

PAIRS = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}


def gradients(count: int) -> list[LowRank]:
    return [
        LowRank(torch.randn(7, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
        for _ in range(count)
    ]


def moved(name: str, lr: float, slopes: list[LowRank]) -> Tensor:
    weights, rule = torch.zeros(7, 5, dtype=torch.float64), OPTIMIZERS[name](lr)
    moments = [torch.zeros_like(weights) for _ in range(rule.moments)]
    for step, slope in enumerate(slopes, 1):
        update(rule, weights, slope, moments, step)
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rules_are_those_of_pytorch(name: str) -> None:
    slopes = gradients(5)
    theirs = torch.zeros(7, 5, dtype=torch.float64, requires_grad=True)
    optimizer = PAIRS[name]([theirs], lr=0.01)
    for slope in slopes:
        theirs.grad = slope.dense()
        optimizer.step()
    torch.testing.assert_close(moved(name, 0.01, slopes), theirs.detach(), rtol=1e-12, atol=1e-14)


def test_the_first_steps_by_hand() -> None:
    (slope,) = gradients(1)
    g = slope.dense()
    torch.testing.assert_close(moved("rmsprop", 0.01, [slope]), -0.01 * g / (0.1 * g.abs() + 1e-8))
    torch.testing.assert_close(moved("adam", 0.01, [slope]), -0.01 * g / (g.abs() + 1e-8))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("block", [1, 12])
def test_it_does_not_matter_how_large_the_blocks_are(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = gradients(3)
    whole = moved(name, 0.01, slopes)
    monkeypatch.setattr(optimizers, "_BLOCK", block)
    torch.testing.assert_close(moved(name, 0.01, slopes), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "size", "rate"),
    [("gpt2", 1e9, 3e-5), ("bart", 1e9, 3e-5), ("gpt2", 2e9, 5e-6), ("bart", 2e9, 1e-4)],
)
def test_the_default_rate_follows_the_model(
    kind: str, size: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_lm(kind)
    monkeypatch.setattr(lm.model, "num_parameters", lambda: int(size))
    assert default_rate(lm) == rate
