"""The radius of a cache whose drawdown is another editor's."""

from __future__ import annotations

import pytest
from reproduction.mend_paper import radius
from reproduction.mend_paper.figures import figures
from reproduction.mend_paper.measure import measure
from reproduction.mend_paper.radius import largest, matching_radius

from cases import Recorded, build_lm, records
from emendo.editors.cache import Cache, CacheConfig
from emendo.models.sites import find_sites


@pytest.mark.parametrize("edge", [0.003, 0.5, 0.77, 1.0, 1.3, 2.0, 4.5, 900.0])
def test_the_largest_that_fits(edge: float) -> None:
    asked: list[float] = []

    def fits(value: float) -> bool:
        asked.append(value)
        return value <= edge

    found = largest(fits)
    assert found <= edge < found * 2 ** (1 / 100)
    assert len(asked) <= 20


def test_where_all_or_none_fit() -> None:
    assert largest(lambda _: True) == 2**20
    assert largest(lambda _: False) == 2**-20


@pytest.mark.slow
def test_the_drawdown_is_matched() -> None:
    """Cache against cache: the radius found lets through what the other one's does, and no more."""
    lm = build_lm("bert")
    facts = records(3, lm.labels)
    sites = find_sites(lm.model)
    wide = Cache(sites, CacheConfig(radius=1.2), lm.fingerprint)
    cache = Cache(sites, CacheConfig(radius=7.0), lm.fingerprint)
    progress = Recorded()
    found = matching_radius(lm, cache, wide, facts, (), progress)
    tries = [done for _, done, _ in progress.updates]
    assert cache.config.radius == 7.0
    assert tries == list(range(1, len(tries) + 1))

    def drawdown(value: float) -> float:
        editor = Cache(sites, CacheConfig(radius=value), lm.fingerprint)
        return figures(measure(lm, editor, facts))["accuracy_drawdown"].mean

    allowed = drawdown(1.2)
    assert drawdown(found) <= allowed
    assert drawdown(found * 2 ** (1 / 16)) > allowed or drawdown(1e9) <= allowed
    assert len(facts) <= radius.FACTS
