"""One table in a terminal, in Markdown, as CSV and in HTML: the same values, and nothing of them is markup."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest
from rich.console import Console

from emendo.cli._tables import print_table, terminal_table
from emendo.evaluate.intervals import Interval
from emendo.report.tables import (
    Cell,
    Column,
    Table,
    markdown_code,
    printable,
    show_value,
    to_csv,
    to_html,
    to_markdown,
)

TABLE = Table(
    (Column("name"), Column("score", "interval"), Column("facts", "count"), Column("", "verdict")),
    (
        ("first", Interval(0.625, 0.5, 0.75), 1234, True),
        "a group",
        ("second", {"mean": None, "low": None, "high": None}, None, False),
        ("third", None, Cell(0.0123, "size", tone="bad"), None),
    ),
    title="A title",
    note="A note.",
)
NASTY = "[red]x[/red] <b>|`*_[a](b)_*`|</b> &amp; \x1b[2J\x9b1m\x07\u202e\ud800 tab\tend"


def rendered(table: Table) -> str:
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(terminal_table(table))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_markdown() -> None:
    assert to_markdown(TABLE).splitlines() == [
        "## A title",
        "",
        "| name | score | facts |  |",
        "| --- | ---: | ---: | --- |",
        "| first | 0.625 (0.500 to 0.750) | 1,234 | ✓ |",
        "| **a group** |  |  |  |",
        "| second | - | - | ✗ |",
        "| third | - | 1.23% |  |",
        "",
        "A note.",
    ]


def test_csv_has_the_raw_values() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows[0] == ["group", "name", "score", "score low", "score high", "facts", ""]
    assert rows[1] == ["", "first", "0.625", "0.5", "0.75", "1234", "✓"]
    assert rows[2] == ["a group", "second", "", "", "", "", "✗"]


def test_html_and_terminal_show_what_markdown_shows() -> None:
    page, text = to_html(TABLE), rendered(TABLE)
    for wanted in ("name", "first", "0.625", "(0.500 to 0.750)", "1,234", "a group", "1.23%", "✗"):
        assert wanted in page and wanted in text
    assert re.findall(r'<th class="figure">(\w+)', page) == ["score", "facts"]


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (0.0, "share", "0.000"),
        (0.00123, "share", "0.00123"),
        (1234.5, "share", "1234"),
        (0.0004, "chance", "<0.1%"),
        (0.003, "chance", "0.3%"),
        (0.75, "chance", "75%"),
        ((0.003, 0.75), "change", "0.3% → 75%"),
        (math.inf, "number", "no number"),
        (math.nan, "share", "no number"),
        (Interval(math.nan, math.nan, math.nan), "interval", "no number"),
        (Interval(0.125, -0.01, 0.26), "difference", "+0.125 (-0.01 to +0.26)"),
        ((0.5, 0.02), "measured", "0.5 ± 0.02"),
        ((0.5, None), "measured", "0.5"),
        (None, "number", "-"),
        (0.1254, "seconds", "0.125 s"),
    ],
)
def test_numbers(value: object, kind: object, shown: str) -> None:
    assert " ".join(show_value(value, kind)).strip() == shown  # type: ignore[arg-type]


def test_control_characters_are_shown() -> None:
    seen = printable(NASTY)
    assert r"\x1b[2J\x9b1m\x07\u202e\ud800" in seen and "tab\tend" in seen
    seen.encode()
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in seen)
    assert printable("two\nlines, naïve, 北京, 🙂") == "two\nlines, naïve, 北京, 🙂"


@pytest.mark.parametrize("place", ["cell", "heading", "group", "title"])
def test_nothing_is_read_as_markup(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"cell": "a", "heading": "b", "group": "c", "title": "d"} | {place: NASTY}
    table = Table((Column(text["heading"]),), (text["group"], (text["cell"],)), text["title"], NASTY)
    print_table(table)
    assert capsys.readouterr().out.count("[red]x[/red]") == 2
    assert "\x1b[2J" not in rendered(table)
    page = to_html(table)
    assert "<b>|" not in page and "&lt;b&gt;" in page and "&amp;amp;" in page
    lines = to_markdown(table).splitlines()
    assert re.sub(r"\\.", "", lines[4]).count("|") == 2  # one column
    assert r"\[red\]x\[/red\] \<b\>\|\`\*\_\[a\](b)\_\*\`\|\</b\>" in to_markdown(table)


def test_a_block_of_code_is_closed_by_its_own_fence_alone() -> None:
    block = markdown_code("emendo evaluate --data 'a```b````c'\n```", "bash").splitlines()
    assert block[0] == "`````bash" and block[-1] == "`````" and len(block) == 4
