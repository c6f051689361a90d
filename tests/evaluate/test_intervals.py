"""Intervals and paired comparisons against plain loops, closed forms and scipy's Wilson interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from emendo.evaluate.intervals import Interval, bootstrap_interval, harmonic, mean_interval, paired


def ratio(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]


def test_a_bootstrap_is_that_of_a_plain_loop() -> None:
    rows = [(1.0, 2.0), (0.0, 4.0), (3.0, 3.0), (2.0, 9.0), (5.0, 6.0)]
    found = bootstrap_interval(rows, ratio, draws=20_000)
    drawn = np.random.default_rng(1).integers(5, size=(20_000, 5)).tolist()
    values = sorted(sum(rows[i][0] for i in row) / sum(rows[i][1] for i in row) for row in drawn)
    assert found is not None
    assert found.mean == pytest.approx(11 / 24)
    assert (found.low, found.high) == pytest.approx((values[500], values[19_500]), abs=0.01)  # sampling error
    assert bootstrap_interval(rows, ratio, draws=500, seed=3) == bootstrap_interval(
        rows, ratio, draws=500, seed=3
    )
    assert bootstrap_interval(rows, ratio, draws=500, seed=3) != bootstrap_interval(
        rows, ratio, draws=500, seed=4
    )


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_interval_of_a_proportion_has_its_usual_width(share: float) -> None:
    count = 400
    found = mean_interval([float(i < share * count) for i in range(count)])
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / count), rel=0.1)


def test_a_bootstrap_encloses_the_statistic() -> None:
    assert bootstrap_interval([(0.25, 1.0)], ratio) == Interval(0.25, 0.25, 0.25)
    largest = bootstrap_interval([(float(i), 1.0) for i in range(9)], lambda sums: sums[..., 0].clamp(min=36))
    assert largest is not None
    assert largest.low == largest.mean == 36


def test_a_bootstrap_of_nothing_and_of_no_number() -> None:
    assert bootstrap_interval([], ratio) is None
    for bad in (math.nan, math.inf):
        found = bootstrap_interval([(1.0, 1.0), (bad, 1.0)], ratio)
        assert found is not None
        assert not math.isfinite(found.mean) and not math.isfinite(found.low)


@pytest.mark.parametrize(("right", "count"), [(20, 20), (0, 20), (1, 1), (0, 1)])
def test_where_all_facts_agree_it_is_wilsons(right: int, count: int) -> None:
    found = mean_interval([float(right > 0)] * count)
    wilson = binomtest(right, count).proportion_ci(method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def test_a_mean() -> None:
    some = mean_interval([1.0] * 8 + [0.0] * 2)
    assert some is not None and some.as_dict() == {"mean": 0.8, "low": 0.5, "high": 1.0}
    same = mean_interval([2.0, 2.0], share=False)
    assert same is not None and (same.low, same.high) == (2, 2)
    assert mean_interval([]) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_an_interval_holds_the_mean_and_stays_between_0_and_1(values: list[float]) -> None:
    found = mean_interval(values)
    assert found is not None
    assert -1e-12 <= found.low <= found.mean <= found.high <= 1 + 1e-12


def test_harmonic_by_hand() -> None:
    assert float(harmonic(torch.tensor([1.0, 0.5]))) == pytest.approx(2 / 3)


def test_a_paired_difference() -> None:
    first, second = [0.0] * 10, [1.0] * 9 + [0.0]
    found = paired(first, second)
    assert found is not None
    assert (found.first, found.second, found.facts) == (0, pytest.approx(0.9), 10)
    assert found.difference.mean == pytest.approx(0.9)
    assert found.p == pytest.approx(2 / 2**9, rel=1e-9)  # exact: all nine that differ must have one sign
    same = paired(first, first)
    assert same is not None and same.p == 1
    assert paired([], []) is None


def test_pairing_sees_what_two_intervals_would_hide() -> None:
    first = [float(i % 2) for i in range(40)]
    second = [max(value, float(i < 12)) for i, value in enumerate(first)]
    found = paired(first, second)
    assert found is not None and found.p < 0.05
    one, two = mean_interval(first), mean_interval(second)
    assert one is not None and two is not None and one.high > two.low
