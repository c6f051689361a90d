"""A table of the paper as data: its rows and columns, the cell behind each place, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from emendo._storage import digest
from emendo.evaluate.intervals import Interval
from reproduction.mend_paper.cells import Cell, Result, with_seed
from reproduction.mend_paper.memory import Memory
from reproduction.mend_paper.paper import Quoted, Table

Place = tuple[str, str]
"""Row and column."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column, of one task or of the paper alone.

    Attributes:
        name: its name here and in the paper's table.
        here: model and data of this run; empty if the column is the paper's alone.
        paper: model and data in the paper; empty if the paper has no such column.
        drawdown: the quantity whose drawdown is given.
    """

    name: str
    here: str
    paper: str
    drawdown: Literal["accuracy", "perplexity"] = "accuracy"


@dataclass(frozen=True, slots=True)
class Statement:
    """An ordering that the paper reports, and whether it holds here; None where figures are missing."""

    holds: bool | None
    text: str


Claim = Callable[["Grid"], Iterator[Statement]]
"""Checks an ordering in a table."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A table to make.

    Attributes:
        name: on the command line.
        title: its subject.
        text: remarks for the reader.
        columns: from left to right.
        rows: names, from top to bottom.
        cells: the cell of each place; a place may be empty.
        paper: the paper's figures by row and column name.
        claims: orderings to check.
        along: the name of the horizontal axis, where the rows are numbers.
        paths: rows that differ in one number alone, from loose to tight, by the name of their method.
    """

    name: str
    title: str
    text: str
    columns: tuple[Column, ...]
    rows: tuple[str, ...]
    cells: Mapping[Place, Cell | Memory]
    paper: Table
    claims: tuple[Claim, ...] = ()
    along: str = ""
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def seeded(cell: Cell | Memory, seeds: int) -> Sequence[Cell | Memory]:
    """The cell with its own seed and the following ones; once if the seed makes no difference."""
    if isinstance(cell, Memory):
        return [cell]
    found = [with_seed(cell, cell.seed + i) for i in range(seeds)]
    plans = [each.plan() for each in found]
    return [each for i, each in enumerate(found) if plans[i] not in plans[:i]]


@dataclass(frozen=True, slots=True)
class Grid:
    """A preset with the results of its cells: one for each seed, none where a cell has not been run.

    Attributes:
        preset: the table.
        results: by place.
    """

    preset: Preset
    results: Mapping[Place, Sequence[Result]]

    @classmethod
    def of(cls, preset: Preset, found: Mapping[str, Result], seeds: int = 1) -> Grid:
        """A preset filled with results.

        Args:
            preset: the table.
            found: results by the digest of their cell's plan.
            seeds: the number of seeds of each cell, counted from its own.
        """
        results = {}
        for place, cell in preset.cells.items():
            plans = [digest(each.plan()) for each in seeded(cell, seeds)]
            results[place] = [found[plan] for plan in plans if plan in found]
        return cls(preset, results)

    def figure(self, row: str, column: str, name: str) -> Interval | None:
        """A figure at a place; None if there is none. Of several seeds: their mean, lowest and highest value."""
        values = [r.figures[name] for r in self.results.get((row, column), ()) if name in r.figures]
        if len(values) < 2:
            return values[0] if values else None
        means = [value.mean for value in values]
        return Interval(fmean(means), min(means), max(means))

    def drawdown(self, row: str, column: Column) -> Interval | None:
        """The drawdown that the column's paper table gives."""
        return self.figure(row, column.name, f"{column.drawdown}_drawdown")

    def pair(self, row: str, column: Column) -> tuple[Interval | None, Interval | None]:
        """Edit success and drawdown at a place."""
        return self.figure(row, column.name, "edit_success"), self.drawdown(row, column)

    def quoted(self, row: str, column: Column) -> Quoted | None:
        """The paper's figures at a place; None if there are none."""
        return self.preset.paper.get(row, {}).get(column.paper or column.name)

    def seeds(self) -> int:
        """The largest number of seeds at any place."""
        return max((len(results) for results in self.results.values()), default=0)

    def missing(self) -> list[Place]:
        """Places whose cells have not been run."""
        return [place for place in self.preset.cells if not self.results.get(place)]

    def statements(self) -> list[Statement]:
        """Every expected ordering, and whether it holds."""
        return [statement for claim in self.preset.claims for statement in claim(self)]
