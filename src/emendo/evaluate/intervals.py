"""Means and other statistics over facts, each with its 95% interval. Facts are what is drawn, never prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""The 97.5% point of the normal distribution."""

DRAWS = 2000
"""How many times a bootstrap draws."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"mean", "low", "high"}``."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The mean of values between 0 and 1, one for each fact, with the 95% Wilson score interval.

    For 0/1 values this is the usual interval of a proportion; unlike a bootstrap it does not shrink to a point when
    every fact succeeds. Where a fact's value is itself a mean (over its paraphrases) the interval is on the safe
    side, since no variable between 0 and 1 with mean p has a variance above p (1 - p).

    Args:
        values: one value for each fact.

    Returns:
        None when there are no values.

    Raises:
        ValueError: a value outside 0 to 1.
    """
    if not values:
        return None
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("mean_interval takes values between 0 and 1.")
    n, z2 = len(values), Z95**2
    mean = math.fsum(values) / n
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def bootstrap_interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[Tensor], Tensor],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval | None:
    """A statistic of sums over facts, with the 95% percentile interval of a bootstrap over the facts.

    Args:
        rows: ``[facts, columns]`` what each fact adds to the sums.
        statistic: float64 sums ``[..., columns]`` to values ``[...]``, such as a difference of two ratios.
        draws: how many times as many facts are drawn, with replacement.
        seed: of the draws.

    Returns:
        None when there are no facts. The bounds always enclose the statistic itself; where it is no finite number,
        neither are they.
    """
    if not rows:
        return None
    table, count = torch.tensor(rows, dtype=torch.float64), len(rows)
    value = float(statistic(table.sum(0)))
    if not math.isfinite(value):
        return Interval(value, value, value)
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(draws, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones(draws, count, dtype=torch.float64))
    low, high = statistic(times @ table).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, min(low, value), max(high, value))


def score_interval(values: Sequence[float], *, share: bool = True) -> Interval | None:
    """The mean of one value for each fact, with its 95% bootstrap interval over the facts.

    Where a bootstrap has nothing to tell, every fact having the same share (all succeed), it is the Wilson interval.

    Args:
        values: one value for each fact.
        share: whether they are shares, between 0 and 1.
    """
    if share and len(set(values)) == 1 and 0 <= values[0] <= 1:
        return mean_interval(values)
    return bootstrap_interval([(value, 1.0) for value in values], lambda sums: sums[..., 0] / sums[..., 1])


def harmonic_interval(rows: Sequence[Sequence[float]]) -> Interval | None:
    """The harmonic mean of the means of several scores, with its 95% bootstrap interval over the facts.

    Args:
        rows: ``[facts, scores]``; facts that lack a score are to be left out before.
    """
    return bootstrap_interval(
        [(*row, 1.0) for row in rows], lambda sums: harmonic(sums[..., :-1] / sums[..., -1:])
    )


def harmonic(values: Tensor) -> Tensor:
    """The harmonic mean over the last dimension; 0 where a value is 0."""
    return values.shape[-1] / (1 / values.clamp(min=0)).sum(-1)


@dataclass(frozen=True, slots=True)
class Paired:
    """How two runs differ on the same facts.

    Attributes:
        first: the mean of the first run.
        second: of the second one.
        difference: second minus first, with its 95% bootstrap interval over the facts.
        p: how often a difference at least as large comes from swapping the two runs' values fact by fact (a sign-flip
            permutation test, two-sided).
        facts: how many facts both runs have.
    """

    first: float
    second: float
    difference: Interval
    p: float
    facts: int


def paired(
    first: Sequence[float], second: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> Paired | None:
    """Compare one value for each fact with another one for the same fact.

    Args:
        first: the first run's values.
        second: the second run's, fact by fact.
        draws: how many sign flips.
        seed: of the draws.

    Returns:
        None when there are no facts.
    """
    if not first:
        return None
    gap = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    difference = bootstrap_interval(
        [(value, 1.0) for value in gap.tolist()], lambda sums: sums[..., 0] / sums[..., 1], seed=seed
    )
    assert difference is not None
    generator = torch.Generator().manual_seed(seed)
    extreme, done = 0, 0
    seen = abs(float(gap.sum())) * (1 - 1e-12)
    while done < draws:
        count = min(draws - done, max(1, 2_000_000 // len(gap)))
        signs = torch.randint(2, (count, len(gap)), generator=generator, dtype=torch.float64) * 2 - 1
        extreme += int(((signs @ gap).abs() >= seen).sum())
        done += count
    n = len(gap)
    return Paired(math.fsum(first) / n, math.fsum(second) / n, difference, (extreme + 1) / (draws + 1), n)
