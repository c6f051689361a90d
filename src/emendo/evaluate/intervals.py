"""Statistics over facts with their 95% intervals, and the paired comparison of two runs.

There is one way to make an interval: the percentile bootstrap over the facts (Efron & Tibshirani, "An Introduction to
the Bootstrap", 1993, section 13.3). It holds for every statistic here, also for ratios, differences and harmonic means,
and it draws facts, never prompts, since the prompts of one fact are not independent. Where all facts have the same
share a bootstrap shrinks to a point; the interval is then Wilson's score interval (Wilson, 1927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DRAWS = 2000
"""Resamples of a bootstrap."""

_Z95 = 1.959963984540054  # the 97.5% point of the normal distribution
_NUMBERS_AT_ONCE = 2_000_000  # of the resamples that are held in memory


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic and its 95% interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"mean", "low", "high"}``."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[Tensor], Tensor],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval | None:
    """A statistic of sums over facts, with the 95% percentile interval of a bootstrap over the facts.

    Args:
        rows: ``[facts, columns]``, the terms that each fact adds to the sums.
        statistic: float64 sums ``[..., columns]`` to values ``[...]``, such as a difference of two ratios.
        draws: the number of resamples.
        seed: of the resampling.

    Returns:
        None when there are no facts. The interval always encloses the statistic; where that is not finite, neither are
        the ends.
    """
    from scipy.stats import bootstrap  # slow to import

    if not rows:
        return None
    table = np.asarray(rows, dtype=np.float64)

    def value_of(*columns: np.ndarray, axis: int) -> np.ndarray:
        sums = np.stack([column.sum(axis) for column in columns], -1)
        return statistic(torch.from_numpy(sums)).numpy()

    value = float(statistic(torch.from_numpy(table.sum(0))))
    if len(rows) == 1 or not math.isfinite(value):
        return Interval(value, value, value)
    found = bootstrap(
        tuple(table.T),
        value_of,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=max(1, _NUMBERS_AT_ONCE // table.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, min(float(found.low), value), max(float(found.high), value))


def mean_interval(values: Sequence[float], *, share: bool = True) -> Interval | None:
    """The mean of one value for each fact, with its 95% interval.

    Args:
        values: one value for each fact.
        share: whether they are shares between 0 and 1, so that an interval is known even where all are equal.

    Returns:
        None when there are no values.
    """
    if share and len(set(values)) == 1 and 0 <= values[0] <= 1:
        return _wilson(values[0], len(values))
    return _mean_bootstrap(tuple(values))


@lru_cache(maxsize=1024)  # a table, its JSON and its page show the same interval
def _mean_bootstrap(values: tuple[float, ...]) -> Interval | None:
    return bootstrap_interval([(value, 1.0) for value in values], lambda sums: sums[..., 0] / sums[..., 1])


def _wilson(mean: float, n: int) -> Interval:
    """Wilson's score interval of a proportion; too wide, if anything, where a fact's value is itself a mean."""
    z2 = _Z95**2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def harmonic_interval(rows: Sequence[Sequence[float]]) -> Interval | None:
    """The harmonic mean of the means of several scores, with its 95% interval.

    Args:
        rows: ``[facts, scores]``, only facts that have all the scores.
    """
    return bootstrap_interval(
        [(*row, 1.0) for row in rows], lambda sums: harmonic(sums[..., :-1] / sums[..., -1:])
    )


def harmonic(values: Tensor) -> Tensor:
    """The harmonic mean over the last dimension; 0 where a value is 0."""
    return values.shape[-1] / (1 / values.clamp(min=0)).sum(-1)


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference of two runs on the same facts.

    Attributes:
        first: the mean of the first run.
        second: the mean of the second run.
        difference: second minus first, with its 95% interval.
        p: of a two-sided permutation test that flips the signs of the facts' differences; exact where there are at most
            10,000 ways to flip them.
        facts: the number of facts.
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
        first: the values of the first run.
        second: those of the second run, in the same order.
        draws: the number of random sign flips.
        seed: of the sign flips.

    Returns:
        None when there are no facts.
    """
    from scipy.stats import permutation_test  # slow to import

    if not first:
        return None
    gap = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    difference = mean_interval(gap.tolist(), share=False)
    assert difference is not None
    p = 1.0
    if gap.any():
        p = permutation_test(
            (gap,),
            lambda values, axis: values.sum(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=draws,
            batch=max(1, _NUMBERS_AT_ONCE // len(gap)),
            rng=np.random.default_rng(seed),
        ).pvalue
    return Paired(math.fsum(first) / len(gap), math.fsum(second) / len(gap), difference, float(p), len(gap))
