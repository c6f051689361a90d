"""The presets: rows, columns and cells that belong together, and the paper's figures as printed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from reproduction.mend_paper import paper, tables
from reproduction.mend_paper.budgets import BUDGETS, EDITORS, Choice, seconds
from reproduction.mend_paper.cells import Cell, Match
from reproduction.mend_paper.figures import PROTOCOL
from reproduction.mend_paper.grid import Grid, seeded
from reproduction.mend_paper.memory import Memory
from reproduction.mend_paper.plots import value_of
from reproduction.mend_paper.presets import PRESETS, build, names_of

from emendo._storage import digest
from emendo.editors import editor_class
from emendo.errors import RequestError
from mend_paper.tiny import mend


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound(name: str) -> None:
    preset = build(name, Choice())
    assert preset.name == name
    columns = {column.name for column in preset.columns}
    for (row, column), cell in preset.cells.items():
        assert row in preset.rows
        assert column in columns
        cell.plan()
        assert seconds(cell) > 0
        assert not isinstance(cell, Cell) or not cell.match or editor_class(cell.editor).name == "cache"
    named = {column.paper or column.name for column in preset.columns}
    for row, quoted in preset.paper.items():
        assert row in preset.rows
        assert quoted.keys() <= named
    empty = Grid.of(preset, {})
    assert empty.missing() == list(preset.cells)
    assert all(statement.holds is None for statement in empty.statements())
    tables.markdown([empty])


def test_tables_share_cells() -> None:
    plans = {name: {digest(c.plan()) for c in build(name, Choice()).cells.values()} for name in PRESETS}
    shared = {"table5": 2, "table6": 2, "table11": 6, "eq5": 6}
    for one, other, count in (("table4", other, count) for other, count in shared.items()):
        assert len(plans[one] & plans[other]) == count, (one, other)
    assert len(plans["table3"] & plans["table9"]) == 1


def test_scale_tasks_editors_and_minutes() -> None:
    whole, tenth = Choice().cell("wikitext", "mend"), Choice(scale=0.1).cell("wikitext", "mend")
    assert tenth.facts == round(whole.facts / 10)
    assert tenth.train_config().steps == round(whole.train_config().steps / 10)
    assert Choice(minutes=2.0).cell("wikitext", "mend").train_config().minutes == 2.0
    part = build("table4", Choice(("atlas-bart",), ("ft", "mend")))
    assert [*part.cells] == [("FT", "question answering"), ("MEND", "question answering")]
    for (row, column), cell in build("table5", Choice(editors=("mend",))).cells.items():
        assert isinstance(cell, Cell)
        assert row == f"k = {cell.k}"
        assert cell.train_config().together == (cell.k if column == "MEND" else 1)
        assert cell.facts % cell.k == 0
    small = build("table5", Choice(scale=0.01)).cells.values()
    assert all(isinstance(cell, Cell) and cell.facts >= cell.k for cell in small)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(tasks=("squad",)), r"no task 'squad' here; there are: atlas-bert"),
        (lambda: Choice(editors=("rome",)), r"no editor 'rome' here; there are: ft, "),
        (lambda: Choice(scale=0.0), r"--scale must be above 0"),
        (lambda: build("table7", Choice()), r"no preset 'table7'; there are: table4, "),
        (lambda: build("table3", Choice(tasks=("wikitext",))), r"Nothing of table3 is left"),
    ],
)
def test_what_does_not_exist_is_named(make: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()  # type: ignore[operator]


def test_names() -> None:
    assert names_of(["table5", "all", "table5"]) == [
        "table5",
        *(name for name in PRESETS if name != "table5"),
    ]
    assert EDITORS.keys() <= {"ft", "ft-kl", "enn", "ke", "mend", *EDITORS}
    assert all(budget.slow <= budget.facts for budget in BUDGETS.values())
    assert len(set(PROTOCOL.values())) == len(PROTOCOL)


def test_seeds() -> None:
    assert [cell.seed for cell in seeded(mend(seed=3), 2)] == [3, 4]  # type: ignore[union-attr]
    cache = mend(editor="cache", settings={}, match=Match(mend()))
    assert [cell.match.cell.seed for cell in seeded(cache, 2)] == [0, 1]  # type: ignore[union-attr]
    assert len(seeded(replace(cache, match=None), 3)) == 1
    assert len(seeded(Memory("tiny", "mend"), 3)) == 1


def test_the_paper_as_printed() -> None:
    assert paper.TABLE4["MEND"][paper.FEVER] == (">0.99", "<0.001")
    assert paper.TABLE11["Cache, 2 eps*"] == {
        paper.FEVER: (">0.99", "0.250"),
        paper.ZSRE: ("1.00", "0.220"),
        paper.WIKITEXT: ("0.002", "2.770"),
    }
    assert [
        len(t) for t in (paper.TABLE3, paper.TABLE4, paper.TABLE5, paper.TABLE6, paper.TABLE9, paper.TABLE11)
    ] == [4, 5, 5, 7, 2, 4]
    for table in (paper.TABLE3, paper.TABLE4, paper.TABLE5, paper.TABLE6, paper.TABLE9, paper.TABLE11):
        for row in table.values():
            assert all(0 <= value_of(q.success) <= 1 and value_of(q.drawdown) >= 0 for q in row.values())
    falls = [value_of(row["MEND"].success) for row in paper.TABLE5.values()]
    assert all(a > b for a, b in pairwise(falls))
