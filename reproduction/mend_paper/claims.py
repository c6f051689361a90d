"""The orderings that the paper reports; each is checked in a table and stated in words."""

from __future__ import annotations

import math
from collections.abc import Iterator

from emendo.evaluate.intervals import Interval
from reproduction.mend_paper.grid import Claim, Column, Grid, Statement
from reproduction.mend_paper.tables import number


def edits_better(better: str, worse: str) -> Claim:
    """In every column, more edit success without more drawdown."""

    def claim(grid: Grid) -> Iterator[Statement]:
        for column in _here(grid):
            high, low = (grid.figure(row, column.name, "edit_success") for row in (better, worse))
            little, much = (grid.drawdown(row, column) for row in (better, worse))
            if high is None or low is None or little is None or much is None:
                yield _unknown(f"{better} against {worse} in {column.name}")
                continue
            more, less = high.mean > low.mean, _no_more(little, much)
            yield Statement(
                more and less,
                f"{column.name}: edit success {_than(better, worse, high, low)}, at {'no more' if less else 'more'} "
                f"drawdown ({number(little.mean)} and {number(much.mean)}).",
            )

    return claim


def succeeds_more(better: str, worse: str, only: str = "") -> Claim:
    """In every column, or in one, more edit success."""

    def claim(grid: Grid) -> Iterator[Statement]:
        for column in _here(grid, only):
            high, low = (grid.figure(row, column.name, "edit_success") for row in (better, worse))
            if high is None or low is None:
                yield _unknown(f"{better} against {worse} in {column.name}")
                continue
            yield Statement(
                high.mean > low.mean,
                f"{column.name}: edit success {_than(better, worse, high, low)}.",
            )

    return claim


def harms_more(more: str, less: str) -> Claim:
    """In every column, more drawdown."""

    def claim(grid: Grid) -> Iterator[Statement]:
        for column in _here(grid):
            high, low = (grid.drawdown(row, column) for row in (more, less))
            if high is None or low is None:
                yield _unknown(f"{more} against {less} in {column.name}")
                continue
            yield Statement(
                not _no_more(high, low),
                f"{column.name}: drawdown {_than(more, less, high, low)}.",
            )

    return claim


def degrades(path: str, than: str) -> Claim:
    """Nowhere on a path as much success on the edit prompt as in another row, without more damage of either kind."""

    def claim(grid: Grid) -> Iterator[Statement]:
        for column in _here(grid):
            other = success_and_damage(grid, than, column)
            points = {row: success_and_damage(grid, row, column) for row in grid.preset.paths[path]}
            found = {row: point for row, point in points.items() if point is not None}
            if other is None or len(found) < len(points):
                yield _unknown(f"{path} against {than} in {column.name}")
                continue
            goal, *most = other
            spared = {
                row: success
                for row, (success, *damage) in found.items()
                if all(d <= m for d, m in zip(damage, most, strict=True))
            }
            best = max(spared, key=spared.__getitem__, default=None)
            said = "there is none" if best is None else f"the best is {best} with {number(spared[best])}"
            yield Statement(
                best is None or spared[best] < goal,
                f"{column.name}, {path}: of the points that damage no more than {than}, whose locality KL is "
                f"{number(most[0])} and which raises the perplexity by {number(most[1])}, {said} in success on the "
                f"edit prompt; {than} has {number(goal)}.",
            )

    return claim


def falls_faster(faster: str, slower: str) -> Claim:
    """From the first to the last row that has both columns, the edit success of one column falls by more."""

    def claim(grid: Grid) -> Iterator[Statement]:
        rows = [
            (row, a.mean, b.mean)
            for row in grid.preset.rows
            if (a := grid.figure(row, faster, "edit_success"))
            and (b := grid.figure(row, slower, "edit_success"))
        ]
        if len(rows) < 2:
            yield _unknown(f"{faster} against {slower} along {grid.preset.along}")
            return
        (first, *begin), (last, *end) = rows[0], rows[-1]
        fall = [was - now for was, now in zip(begin, end, strict=True)]
        faster_here = fall[0] > max(0.0, fall[1])
        verb = "falls off faster than" if faster_here else "does not fall off faster than"
        yield Statement(
            faster_here,
            f"From {first} to {last}, edit success of {faster} {verb} that of {slower} "
            f"({begin[0]:.2f} to {end[0]:.2f}, and {begin[1]:.2f} to {end[1]:.2f}).",
        )

    return claim


def grows_faster(faster: str, slower: str) -> Claim:
    """From the smallest to the largest model that both have, the memory of one grows by more."""

    def claim(grid: Grid) -> Iterator[Statement]:
        seen = [
            (column.name, a.mean, b.mean)
            for column in grid.preset.columns
            if (a := grid.figure(faster, column.name, "memory"))
            and (b := grid.figure(slower, column.name, "memory"))
        ]
        if len(seen) < 2:
            yield _unknown(f"{faster} against {slower}")
            return
        (first, *begin), (last, *end) = seen[0], seen[-1]
        more = end[0] - begin[0] > end[1] - begin[1]
        yield Statement(
            more,
            f"From {first} to {last}, the memory that training {faster} adds {'grows' if more else 'does not grow'} by "
            f"more than that of {slower} ({begin[0]:.0f} to {end[0]:.0f} MB, and {begin[1]:.0f} to {end[1]:.0f} MB).",
        )

    return claim


def success_and_damage(grid: Grid, row: str, column: Column) -> tuple[float, float, float] | None:
    """Success on the edit prompt, locality KL, and rise of the perplexity."""
    names = ("success", "locality_kl", "perplexity_drawdown")
    success, locality, text = (grid.figure(row, column.name, name) for name in names)
    if success is None or locality is None or text is None:
        return None
    return success.mean, locality.mean, text.mean


def _here(grid: Grid, only: str = "") -> list[Column]:
    return [column for column in grid.preset.columns if column.here and only in ("", column.name)]


def _unknown(what: str) -> Statement:
    return Statement(None, f"{what}: unknown, figures are missing.")


def _than(one: str, other: str, high: Interval, low: Interval) -> str:
    """Whether one row's figure is above another's, and whether the intervals overlap."""
    verb = "is above" if high.mean > low.mean else "is not above"
    overlap = "; the intervals overlap" if high.mean > low.mean and not high.low > low.high else ""
    return f"of {one} {verb} that of {other} ({number(high.mean)} and {number(low.mean)}{overlap})"


def _no_more(one: Interval, other: Interval) -> bool:
    """Whether a drawdown is at most another one; a value that is not finite exceeds every other."""
    return math.isfinite(one.mean) and not one.mean > other.mean
