"""Penalised fine-tuning: the proximal operators against solvers, and where the search comes to rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from cases import build_lm, in_slow_suite, records_for, unchanged
from emendo.editors._penalties import proximal_l2, proximal_linf
from emendo.editors.descent import OPTIMIZERS, Adam, update
from emendo.editors.ft_penalised import PenalisedConfig, PenalisedFineTuning
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text
from emendo.models.tokenization import to_texts
from naive_descent import fine_tuned


@pytest.fixture(scope="module")
def exact() -> LM:
    return build_lm("gpt2", torch.float64)


# ---------------------------------------------------------------------------------------- the operators

entries = st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), min_size=1, max_size=6)
scales = st.lists(st.floats(0.1, 10).map(lambda x: round(x, 2)), min_size=6, max_size=6)
weights = st.floats(0.01, 60).map(lambda x: round(x, 2))


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(change=entries, metric=scales, weight=scales)
def test_the_l2_operator(change: list[float], metric: list[float], weight: list[float]) -> None:
    """The minimum of a sum of parabolas, one for each entry."""
    found = proximal_l2(vector(change), vector(metric[: len(change)]), vector(weight[: len(change)]))
    for x, y, h, w in zip(found.tolist(), change, metric, weight, strict=False):
        assert w * x + h * (x - y) == pytest.approx(0, abs=1e-9)


def bounded(loss: Any, slope: Any, size: int, weight: float) -> Any:
    """The minimum of ``loss(x) + weight * max |x|``, as a smooth problem: ``t`` bounds every entry at that price."""
    solved = minimize(
        lambda z: loss(z[:-1]) + weight * z[-1],
        np.append(np.zeros(size), 1.0),
        jac=lambda z: np.append(slope(z[:-1]), weight),
        constraints=[
            {"type": "ineq", "fun": lambda z: z[-1] - z[:-1]},
            {"type": "ineq", "fun": lambda z: z[-1] + z[:-1]},
        ],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return solved.x[:-1]


@given(change=entries, metric=scales, weight=weights)
def test_the_linf_operator_against_a_solver(change: list[float], metric: list[float], weight: float) -> None:
    y, h = np.array(change), np.array(metric[: len(change)])
    found = proximal_linf(vector(change), vector(list(h)), weight).numpy()

    def value(x: Any) -> float:
        return float(weight * np.abs(x).max() + (h * (x - y) ** 2).sum() / 2)

    solved = bounded(lambda x: (h * (x - y) ** 2).sum() / 2, lambda x: h * (x - y), len(y), weight)
    assert value(found) <= value(solved) + 1e-7 * (1 + abs(value(found)))
    np.testing.assert_allclose(found, solved, atol=2e-3)


def on_the_l1_ball(y: Tensor, radius: float) -> Tensor:
    """The nearest point with ``sum |x| <= radius``, by trying every number of entries that stay."""
    if float(y.abs().sum()) <= radius:
        return y
    size = y.abs().sort(descending=True).values
    cuts = [(float(size[:k].sum()) - radius) / k for k in range(1, len(size) + 1)]
    points = [y.sign() * (y.abs() - cut).clamp(min=0) for cut in cuts if cut >= 0]
    inside = [x for x in points if float(x.abs().sum()) <= radius + 1e-9]
    return min(inside, key=lambda x: float((x - y).norm()))


@given(change=entries, weight=weights)
def test_moreaus_identity(change: list[float], weight: float) -> None:
    """In the usual metric the operator of the norm leaves what the ball of the dual norm does not hold."""
    y = vector(change)
    found = proximal_linf(y, torch.ones_like(y), weight)
    torch.testing.assert_close(found + on_the_l1_ball(y, weight), y, rtol=0, atol=1e-9)


def test_a_large_change_in_single_precision() -> None:
    """The sum of what is cut off, weighted by the metric, is the weight."""
    torch.manual_seed(0)
    change, metric = torch.randn(576, 300) * 1e-3, torch.rand(576, 300) * 1e4 + 1
    for weight in (1e-3, 1.0, 1e3, 5e5, 1e9):
        found = proximal_linf(change, metric, weight).double()
        assert found.shape == change.shape
        removed = float((metric * (change - found).abs()).sum())
        assert removed == pytest.approx(min(weight, float((metric * change.abs()).double().sum())), rel=2e-3)
        assert bool((found.abs() <= found.abs().max()).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_metric_is_that_of_the_step(name: str) -> None:
    """A step is the direction divided by the metric: RMSprop's direction is the gradient, Adam's its running mean."""
    torch.manual_seed(0)
    rule, weights = OPTIMIZERS[name](0.01), torch.zeros(7, 5, dtype=torch.float64)
    moments = [torch.zeros_like(weights) for _ in range(rule.moments)]
    for step in range(1, 4):
        before = weights.clone()
        slope = LowRank(torch.randn(7, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
        update(rule, weights, slope, moments, step)
        direction = moments[0] / (1 - 0.9**step) if isinstance(rule, Adam) else slope.dense()
        torch.testing.assert_close(weights - before, -direction / rule.metric(moments, step))


# --------------------------------------------------------------------------------- where it comes to rest


def facts_of(lm: LM, n: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records_for(lm, n)]


def texts_of(lm: LM, facts: list[Request]) -> list[Text]:
    return to_texts(lm, [(fact.prompt, fact.target) for fact in facts])


PROXIMAL = {"l2": partial(proximal_l2, weight=0.5), "linf": partial(proximal_linf, weight=2.0)}


@pytest.mark.parametrize(("norm", "coefficient"), [("l2", 0.5), ("linf", 2.0)])
def test_it_is_descent_with_a_proximal_step(exact: LM, norm: Any, coefficient: float) -> None:
    facts, sites = facts_of(exact, 2), find_sites(exact.model)
    texts, usual = texts_of(exact, facts), partial(torch.optim.Adam, lr=1e-3)
    editor = PenalisedFineTuning(sites, PenalisedConfig(steps=3, lr=1e-3, norm=norm, coefficient=coefficient))
    with unchanged(exact.model):
        found = editor.together(exact, facts)
    expected, _ = fine_tuned(exact, texts, usual, 3, until=1e-2, proximal=PROXIMAL[norm])
    free, _ = fine_tuned(exact, texts, usual, 3, until=1e-2)
    for name, change in found.items():
        assert (change.dense() - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        assert (free[name] - expected[name]).norm() > 0.01 * expected[name].norm(), name


@pytest.mark.parametrize("name", in_slow_suite(*OPTIMIZERS, but=("adam",)))
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_it_rests_at_the_minimum_of_the_penalised_loss(name: str, norm: str) -> None:
    """Of a loss ``|A x - b|^2 / 2``, which a solver minimises too; the optimiser does not matter."""
    random = np.random.default_rng(0)
    A, b = random.normal(size=(12, 8)), random.normal(size=12) * 4
    weight = {"l2": 0.5, "linf": 2.0}[norm]
    rule, x = OPTIMIZERS[name](2e-2 if name == "adam" else 3e-3), torch.zeros(8, 1, dtype=torch.float64)
    moments, forward = [torch.zeros_like(x) for _ in range(rule.moments)], torch.tensor(A)
    for step in range(1, 2501):
        slope = forward.T @ (forward @ x - torch.tensor(b)[:, None])
        update(rule, x, LowRank(slope, torch.ones(1, 1, dtype=x.dtype)), moments, step)
        x = PROXIMAL[norm](x, rule.metric(moments, step))
    if norm == "l2":
        expected = np.linalg.solve(A.T @ A + weight * np.eye(8), A.T @ b)
    else:
        expected = bounded(lambda x: ((A @ x - b) ** 2).sum() / 2, lambda x: A.T @ (A @ x - b), 8, weight)
    np.testing.assert_allclose(x[:, 0], expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "l0"}, "norm must be one of l2, linf, not 'l0'"),
        ({"coefficient": 0.0}, "coefficient must be above 0, not 0.0"),
        ({"until": 0.0}, "until must be above 0, not 0.0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        PenalisedConfig(**settings)
