"""Tables, statements and the page, with cells that were not run, figures that are no number, and several seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from reproduction.mend_paper import claims, paper, tables
from reproduction.mend_paper.cells import Result
from reproduction.mend_paper.grid import Column, Grid, Preset, Statement
from reproduction.mend_paper.memory import Memory
from reproduction.mend_paper.page import page

from emendo.evaluate.intervals import Interval
from mend_paper.tiny import mend

HERE = Column("made up", "tiny llama", "BERT-base, FEVER")
QUOTED = Column("theirs", "", "distilGPT-2, Wikitext", "perplexity")
PRESET = Preset(
    "table0",
    "A table",
    "About it.",
    (HERE, QUOTED),
    ("FT", "MEND", "KE"),
    {("FT", "made up"): mend(facts=1), ("MEND", "made up"): mend()},
    paper.TABLE4,
    (claims.edits_better("MEND", "FT"), claims.succeeds_more("MEND", "KE")),
)
NAN = Interval(math.nan, math.nan, math.nan)


def result(success: float, drawdown: Interval | float, **more: object) -> Result:
    harm = (
        drawdown if isinstance(drawdown, Interval) else Interval(drawdown, drawdown - 0.01, drawdown + 0.02)
    )
    figures = {
        "edit_success": Interval(success, success - 0.1, min(1, success + 0.1)),
        "accuracy_drawdown": harm,
        "rank": Interval(3, 3, 3),
    }
    training = {"steps": 4, "seconds": 1.5, "parameters": 12345}
    return Result(figures, training, 2.0, **more)  # type: ignore[arg-type]


def grid(*ft: Result, mend: tuple[Result, ...] = ()) -> Grid:
    return Grid(PRESET, {("FT", "made up"): ft, ("MEND", "made up"): mend})


GRIDS = {
    "nothing run": grid(),
    "one run": grid(result(0.5, 0.25)),
    "no number": grid(result(0.0, NAN), mend=(result(0.9, 0.0004),)),
    "two seeds": grid(result(0.5, 0.25), mend=(result(0.9, 0.0), result(0.7, 0.1))),
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_output_renders(name: str) -> None:
    text = tables.markdown([GRIDS[name]])
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths)) <= 3  # the places, the statements and the details
    html = page([GRIDS[name]], "emendo compare", {"machine": "<any>"})
    assert "&lt;any&gt;" in html
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", html)
    assert ("<svg" in html) == (name != "nothing run")
    assert "nan" not in text.lower()
    json.dumps(tables.values(GRIDS[name]), allow_nan=False)


def test_the_first_table() -> None:
    text = tables.markdown([GRIDS["no number"]])
    assert "| FT | **0.000 / no number**<br>" in text
    ours = r"| MEND | **0.900 / \<0.001**<br>0.800 to 1.000 / -0.010 to 0.020<br>"
    assert ours + r"paper: \>0.99 / \<0.001 | 0.86 / 0.225 |" in text
    assert "| KE | **-**<br>paper: 0.95 / 0.004 | 0.25 / 0.595 |" in text
    assert "|  | here: tiny llama; paper: BERT-base, FEVER | paper: distilGPT-2, Wikitext |" in text
    nothing = tables.markdown([GRIDS["nothing run"]])
    assert "| FT | **not run**<br>paper: 0.76 / \\<0.001 | 0.29 / 0.938 |" in nothing


def test_several_seeds_are_their_mean_and_range() -> None:
    both = GRIDS["two seeds"].figure("MEND", "made up", "edit_success")
    assert both is not None
    assert (both.mean, both.low, both.high) == (pytest.approx(0.8), 0.7, 0.9)
    assert "over 2 seeds" in tables.legend(GRIDS["two seeds"])
    assert "seeds" not in tables.legend(GRIDS["one run"])


def test_the_csv_has_a_line_for_every_figure_and_seed() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated([GRIDS["two seeds"]]))))
    assert len(rows) == 9
    assert [(r["row"], r["seed"], float(r["value"])) for r in rows if r["figure"] == "edit_success"] == [
        ("FT", "0", 0.5),
        ("MEND", "0", 0.9),
        ("MEND", "1", 0.7),
    ]
    assert {r["figure"]: r["paper"] for r in rows if r["row"] == "FT"} == {
        "edit_success": "0.76",
        "accuracy_drawdown": "<0.001",
        "rank": "",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0004, "<0.001"),
        (0.0, "0.000"),
        (-0.0004, "0.000"),
        (-0.004, "-0.004"),
        (0.25, "0.250"),
        (12.3456, "12.35"),
        (math.inf, "no number"),
    ],
)
def test_numbers_are_written_as_the_paper_does(value: float, text: str) -> None:
    assert tables.number(value) == text


# ---------------------------------------------------------------------------------------- statements


def test_better_edits() -> None:
    def first(table: Grid) -> Statement:
        return table.statements()[0]

    seen = first(grid(result(0.5, 0.25), mend=(result(0.9, 0.0),)))
    assert seen.holds
    assert (
        "edit success of MEND is above that of FT (0.900 and 0.500), at no more drawdown (0.000" in seen.text
    )
    close = first(grid(result(0.85, 0.25), mend=(result(0.9, 0.0),)))
    assert close.holds
    assert "; the intervals overlap)" in close.text
    assert first(grid(result(0.5, 0.0), mend=(result(0.9, 0.25),))).holds is False
    assert first(grid(result(0.9, 0.0), mend=(result(0.9, 0.0),))).holds is False
    assert first(GRIDS["no number"]).holds is True
    assert first(grid(result(0.5, 0.25), mend=(result(0.9, NAN),))).holds is False
    assert [s.holds for s in GRIDS["one run"].statements()] == [None, None]


def test_one_falls_faster() -> None:
    columns = (Column("ENN", "x", ""), Column("MEND", "x", ""))
    rows = ("k = 1", "k = 5", "k = 25")
    table = replace(
        PRESET, rows=rows, columns=columns, cells={}, claims=(claims.falls_faster("ENN", "MEND"),)
    )
    values = {("k = 1", "ENN"): 0.9, ("k = 1", "MEND"): 0.9, ("k = 5", "ENN"): 0.2, ("k = 5", "MEND"): 0.6}
    found = Grid(table, {place: [result(value, 0.0)] for place, value in values.items()}).statements()
    assert found == [
        Statement(
            True,
            "From k = 1 to k = 5, edit success of ENN falls off faster than that of MEND (0.90 to 0.20, and 0.90 to "
            "0.60).",
        )
    ]
    assert Grid(table, {}).statements()[0].holds is None


def test_one_grows_faster() -> None:
    sizes = {"small": 10.0, "large": 50.0}
    table = Preset(
        "t",
        "T",
        "",
        tuple(Column(name, name, "") for name in sizes),
        ("ENN", "MEND"),
        {(row, name): Memory(name, row.lower()) for row in ("ENN", "MEND") for name in sizes},
        {},
        (claims.grows_faster("ENN", "MEND"),),
    )

    def took(value: float, size: float) -> list[Result]:
        return [
            Result({n: Interval(v, v, v) for n, v in (("memory", value), ("model_parameters", size * 1e6))})
        ]

    results = {("ENN", n): took(3 * size, size) for n, size in sizes.items()}
    results |= {("MEND", n): took(size, size) for n, size in sizes.items()}
    full = Grid(table, results)
    (statement,) = full.statements()
    assert statement.holds
    assert "30 to 150 MB, and 10 to 50 MB" in statement.text
    assert "| ENN | **30 MB** | **150 MB** |" in tables.markdown([full]).replace("<br>", "")
    assert page([full], "c", {}).count("<svg") == 1
