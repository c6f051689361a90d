"""One table of raw values, rendered as Markdown, CSV or HTML; the terminal renderer is :mod:`emendo.cli._tables`.

All numbers that people read are formatted here, by the kind of their column. Nothing in a cell is taken as markup:
Markdown and HTML are escaped, and control characters are shown instead of sent (:func:`printable`).
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "text",  # a string
    "count",  # 1,234
    "number",  # four significant digits
    "share",  # a score: 0.625
    "chance",  # a probability: 75%, 0.3%, <0.1%
    "change",  # two probabilities, before and after: 0.3% → 75%
    "size",  # a relative norm: 0.12%
    "seconds",  # 0.125 s
    "interval",  # an Interval, or a mapping with mean, low and high: 0.625 (0.500 to 0.750)
    "difference",  # the same with signs: +0.125 (-0.010 to +0.260)
    "measured",  # a value with its standard error: 0.5 ± 0.02
    "verdict",  # True, False or None: ✓, ✗ or nothing
]
Tone = Literal["", "good", "bad", "warning", "soft", "strong"]

NO_NUMBER = "no number"
"""Shown for a value that is infinite or NaN."""

_LEFT = ("text", "verdict")
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that could control a terminal, or reverse the direction of writing, or that cannot be encoded."""
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)")


@dataclass(frozen=True, slots=True)
class Column:
    """A column.

    Attributes:
        name: the heading.
        kind: how its values are formatted.
        missing: shown for None.
        width: characters at most in a terminal; longer text is wrapped.
    """

    name: str
    kind: Kind = "text"
    missing: str = "-"
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """A value that is not formatted like the rest of its column.

    Attributes:
        value: the raw value.
        kind: how it is formatted.
        aside: text that follows it, dimmed.
        tone: its colour.
    """

    value: Any
    kind: Kind = "text"
    aside: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        columns: the columns, left to right.
        rows: one value for each column: a raw value, a :class:`Cell`, or a tuple of cells that stand below each other.
            A string instead of a row is a heading over the rows that follow.
        title: above the table.
        note: below the table.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any] | str]
    title: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """A formatted value: its text, the dimmed remark beside it, and its tone."""

    text: str
    aside: str = ""
    tone: Tone = ""

    def __str__(self) -> str:
        return f"{self.text} {self.aside}".strip()


def shown(value: Any, column: Column) -> list[Shown]:
    """A cell's formatted lines."""
    parts = value if isinstance(value, tuple) and value and isinstance(value[0], Cell) else (value,)
    lines = []
    for part in parts:
        cell = part if isinstance(part, Cell) else Cell(part, column.kind)
        text, aside = show_value(cell.value, cell.kind, column.missing)
        tone = cell.tone
        if cell.kind == "verdict" and not tone and cell.value is not None:
            tone = "good" if cell.value else "bad"
        lines.append(Shown(printable(text), printable(cell.aside or aside), tone))
    return lines


def right_aligned(column: Column) -> bool:
    """Whether the values of a column are aligned to the right."""
    return column.kind not in _LEFT


# ------------------------------------------------------------------------------------------------ numbers


def show_value(value: Any, kind: Kind, missing: str = "-") -> tuple[str, str]:
    """A raw value as text, and its dimmed part (an interval's ends, a standard error).

    Args:
        value: the value; None is shown as ``missing``.
        kind: how it is formatted.
        missing: shown for None.
    """
    if kind == "verdict":
        return ("" if value is None else "✓" if value else "✗"), ""
    if value is None:
        return missing, ""
    if kind == "interval" or kind == "difference":
        return _interval(value, kind, missing)
    if kind == "change":
        return " → ".join(chance(side) for side in value), ""
    if kind == "measured":
        amount, error = value
        return show_value(amount, "number", missing)[0], "" if error is None else f"± {number(error)}"
    return _FORMATS.get(kind, str)(value), ""


def number(value: float) -> str:
    """Four significant digits; whole numbers in full."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else NO_NUMBER


def share(value: float) -> str:
    """Three decimals; significant digits where the value is very small or large."""
    if not math.isfinite(value):
        return NO_NUMBER
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def chance(value: float) -> str:
    """A probability in percent, with a decimal where it is small."""
    if not math.isfinite(value):
        return NO_NUMBER
    if 0 < value < 0.0005:
        return "<0.1%"
    return f"{value:.0%}" if value >= 0.0995 or value == 0 else f"{value:.1%}"


def size(value: float) -> str:
    """A relative norm in percent."""
    return f"{value:.2%}" if math.isfinite(value) else NO_NUMBER


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.3f} s" if value < 10 else f"{value:,.0f} s"


_FORMATS: Mapping[Kind, Callable[[Any], str]] = {
    "count": lambda value: f"{value:,}",
    "number": number,
    "share": share,
    "chance": chance,
    "size": size,
    "seconds": seconds,
}


def _interval(value: Any, kind: Kind, missing: str) -> tuple[str, str]:
    ends = [value[k] if isinstance(value, Mapping) else getattr(value, k) for k in ("mean", "low", "high")]
    if any(end is None for end in ends):
        return missing, ""
    if not all(map(math.isfinite, ends)):
        return NO_NUMBER, ""
    form = share if kind == "interval" else lambda end: f"{end:+.4g}"
    mean, low, high = map(form, ends)
    return mean, f"({low} to {high})"


# --------------------------------------------------------------------------------------------------- text


def printable(text: str) -> str:
    r"""Replace every character that could control a terminal by its escape, such as ``\x1b`` or ``\u202e``.

    These are the C0 and C1 controls except tab and line feed, the marks of the direction of writing, line and paragraph
    separators, and lone surrogates, which cannot be encoded.
    """
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def markdown_text(text: str) -> str:
    """Text on one line of Markdown that is shown as it is: no emphasis, link, image or HTML is read from it."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(printable(text).split("\n")))


def markdown_code(text: str, language: str = "") -> str:
    """A fenced block of code, whatever backticks the text has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


# ---------------------------------------------------------------------------------------------- renderers


def to_markdown(table: Table, *, level: int = 2) -> str:
    """The table in GitHub's Markdown.

    Args:
        table: the table.
        level: of the title's heading.
    """
    lines = [f"{'#' * level} {markdown_text(table.title)}", ""] if table.title else []
    lines.append(_bar(markdown_text(column.name) for column in table.columns))
    lines.append(_bar("---:" if right_aligned(column) else "---" for column in table.columns))
    for row in table.rows:
        if isinstance(row, str):
            lines.append(_bar([f"**{markdown_text(row)}**", *[""] * (len(table.columns) - 1)]))
            continue
        cells = (shown(value, column) for value, column in zip(row, table.columns, strict=True))
        lines.append(_bar("<br>".join(map(_markdown, cell)) for cell in cells))
    if table.note:
        lines += ["", markdown_text(table.note)]
    return "\n".join(lines) + "\n"


def _markdown(part: Shown) -> str:
    text = markdown_text(part.text)
    text = f"**{text}**" if part.tone == "strong" and text else text
    return f"{text} {markdown_text(part.aside)}".strip()


def _bar(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_csv(table: Table) -> str:
    """The table's raw values; an interval takes three columns, and a heading over rows becomes their first column."""
    grouped = any(isinstance(row, str) for row in table.rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["group"] if grouped else []
    for column in table.columns:
        head += [column.name]
        head += (
            [f"{column.name} low", f"{column.name} high"] if column.kind in ("interval", "difference") else []
        )
    writer.writerow(head)
    group = ""
    for row in table.rows:
        if isinstance(row, str):
            group = row
            continue
        line: list[Any] = [group] if grouped else []
        for value, column in zip(row, table.columns, strict=True):
            line += _plain(value, column)
        writer.writerow(line)
    return out.getvalue()


def _plain(value: Any, column: Column) -> list[Any]:
    if column.kind in ("interval", "difference") and not isinstance(value, Cell):
        if value is None:
            return ["", "", ""]
        keys = ("mean", "low", "high")
        return [value[key] if isinstance(value, Mapping) else getattr(value, key) for key in keys]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return ["" if value is None else "\n".join(map(str, shown(value, column)))]


def to_html(table: Table) -> str:
    """The table as HTML for :mod:`emendo.report.html`'s pages, everything in it escaped."""
    head = "".join(f"<th{_align(column)}>{html.escape(column.name)}</th>" for column in table.columns)
    lines = [f"<h3>{html.escape(table.title)}</h3>"] if table.title else []
    lines += ['<div class="scroll"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for row in table.rows:
        if isinstance(row, str):
            lines.append(f'<tr class="kind"><td colspan="{len(table.columns)}">{html.escape(row)}</td></tr>')
            continue
        cells = (
            f"<td{_align(column)}>{'<br>'.join(map(_html, shown(value, column)))}</td>"
            for value, column in zip(row, table.columns, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    if table.note:
        lines.append(f'<p class="soft">{html.escape(table.note)}</p>')
    return "\n".join(lines)


_TAGS: Mapping[str, tuple[str, str]] = {
    "good": ('<span class="mark yes">', "</span>"),
    "bad": ('<span class="mark no">', "</span>"),
    "warning": ('<span class="mark no">', "</span>"),
    "soft": ('<span class="soft">', "</span>"),
    "strong": ("<b>", "</b>"),
    "": ("", ""),
}


def _html(part: Shown) -> str:
    begin, end = _TAGS[part.tone]
    text = f"{begin}{html.escape(part.text)}{end}" if part.text else ""
    aside = f'<span class="soft">{html.escape(part.aside)}</span>' if part.aside else ""
    return f"{text} {aside}".strip()


def _align(column: Column) -> str:
    return ' class="figure"' if right_aligned(column) else ""
