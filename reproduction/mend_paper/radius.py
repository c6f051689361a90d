"""The radius of a cache at which its drawdown is another editor's (MEND, appendix G)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from emendo.data.schema import Record
from emendo.editors import Editor
from emendo.models.lm import LM
from emendo.progress import SILENT, Progress
from reproduction.mend_paper.figures import figures
from reproduction.mend_paper.measure import measure

FACTS = 24
"""The largest number of validation facts used to find the radius."""
_HALVINGS = 5  # a radius is found to within a factor of 2 ** (1 / 2**5): 2%


def matching_radius(
    lm: LM,
    cache: Editor,
    other: Editor,
    records: Sequence[Record],
    passages: Sequence[str],
    progress: Progress = SILENT,
) -> float:
    """The largest radius at which the cache's drawdown is no more than the other editor's.

    Args:
        lm: the model.
        cache: the cache; its own radius is ignored.
        other: the editor to match.
        records: validation facts, of which the first ``FACTS`` are edited.
        passages: plain texts, if the drawdown is of perplexity.
        progress: receives the progress.
    """
    tries = 0

    def drawdown(editor: Editor) -> float:
        found = figures(measure(lm, editor, records[:FACTS], passages))
        return found["perplexity_drawdown" if passages else "accuracy_drawdown"].mean

    allowed = drawdown(other)

    def fits(radius: float) -> bool:
        nonlocal tries
        tries += 1
        progress.update("radius", tries, max(tries, 2 * _HALVINGS))
        cache.config = replace(cache.config, radius=radius)
        return drawdown(cache) <= allowed

    before = cache.config
    try:
        return largest(fits, _HALVINGS)
    finally:
        cache.config = before


def largest(fits: Callable[[float], bool], halvings: int = 8) -> float:
    """The largest number that fits, to within a factor; all numbers below it must fit, and none above it.

    Powers of two enclose it first, then their exponents are halved. 2^-20 where none fits, 2^20 where all do.
    """
    low, high = -20.0, 20.0
    at = 0.0
    if fits(1.0):
        while at < high and fits(2.0 ** (at + 1)):
            at += 1
        low, high = at, at + 1
    else:
        while at > low and not fits(2.0 ** (at - 1)):
            at -= 1
        low, high = at - 1, at
    if low < -20 or high > 20:
        return float(2.0 ** max(-20.0, min(20.0, low)))
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(2.0**middle) else (low, middle)
    return float(2.0**low)
