"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from emendo.cli._console import output

if TYPE_CHECKING:
    from emendo.evaluate import Answer, Row

_KINDS = {
    "edit": "edited prompt",
    "paraphrase": "rewordings",
    "neighbour": "near neighbours",
    "unrelated": "unrelated prompts",
}
_SCORES = {
    "edit_success": "edit success",
    "generalisation": "generalisation",
    "locality": "locality",
    "locality_neighbours": "  near neighbours",
    "locality_unrelated": "  unrelated",
}


def before_after(rows: Sequence[Row]) -> None:
    """Print the likeliest answers without and with an edit, and what became of the target's probability."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=False)
    table.add_column("prompt", max_width=44)
    table.add_column("before", max_width=26)
    table.add_column("after", max_width=26)
    table.add_column(f"P({rows[0].target})", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    kind = None
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            table.add_row(f"[bold]{_KINDS[kind]}[/bold]")
        wanted = row.reached if kind in ("edit", "paraphrase") else not row.changed
        table.add_row(
            escape(row.prompt),
            _answers(row.before),
            _answers(row.after),
            f"{_percent(row.target_before)} → {_percent(row.target_after)}",
            "[green]✓[/green]" if wanted else "[red]✗[/red]",
        )
    console = output()
    console.print(table)
    console.print(
        f"[dim]✓ as it should be: the edited prompt and its rewordings give {escape(repr(rows[0].target))}, the others "
        "answer as before[/dim]"
    )


def rows_as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [asdict(row) for row in rows]


def scores(figures: Mapping[str, Any]) -> None:
    """Print an evaluation's scores with their intervals, from what its ``as_dict()`` gives."""
    generated = figures.get("generated")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    how = figures["protocol"]["edits"].partition(", each")[0]
    table.add_column(f"{figures['records']} facts, edited {how}")
    table.add_column("teacher forced")
    if generated:
        table.add_column("free generation")
    for name, heading in _SCORES.items():
        if name in figures["teacher_forced"]:
            cells = [_interval(figures["teacher_forced"][name])]
            cells += [_interval(generated[name])] if generated else []
            table.add_row(heading, *cells)
    if generated:
        table.add_row("  whole text unchanged", "", _interval(generated["locality_whole_text"]))
    output().print(table)
    output().print(
        f"[dim]in brackets the 95% interval; {figures['seconds_per_edit']:.2f} s for an edit[/dim]"
    )
    _damage(figures.get("damage") or {})
    harness(figures.get("lm_eval"))


_DAMAGE = {
    "perplexity": ("perplexity of plain text", "max"),
    "ability": ("questions of other kinds answered", "min"),
}
"""Damage that is printed: its heading, and which extreme is the worst."""


def _damage(figures: Mapping[str, Any]) -> None:
    """What the edits did away from their facts; nothing where nobody looked."""
    if not any(name in figures for name in _DAMAGE):
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("elsewhere", "clean model", "after an edit (median)", "after the worst"):
        table.add_column(heading, justify="left" if heading == "elsewhere" else "right")
    for name, (heading, worst) in _DAMAGE.items():
        if name in figures:
            seen = figures[name]
            table.add_row(heading, *(_plain(seen[key]) for key in ("clean", "median", worst)))
    output().print(table)


def _plain(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"


def harness(found: Mapping[str, Any] | None) -> None:
    """Print what tasks of the evaluation harness gave, from ``lm_eval`` of the figures; None prints nothing."""
    if found is None:
        return
    if found["scores"]:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for heading in ("lm-eval", "clean model", "with the edits"):
            table.add_column(heading, justify="left" if heading == "lm-eval" else "right")
        for name, score in found["scores"].items():
            cells = (_with_error(score[side], score[f"{side}_stderr"]) for side in ("before", "after"))
            table.add_row(escape(name), *cells)
        output().print(table)
    output().print(f"[dim]lm-eval: {escape(found['edits'])}[/dim]")


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "[dim]no number[/dim]"
    return f"{value:.4g}" if error is None else f"{value:.4g} [dim]± {error:.2g}[/dim]"


def _answers(answers: Sequence[Answer]) -> str:
    return "\n".join(f"{escape(a.text)} [dim]{_percent(a.probability)}[/dim]" for a in answers)


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"


def _interval(value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "[dim]no such prompt[/dim]"
    return f"{value['mean']:.1%} [dim]({value['low']:.1%} to {value['high']:.1%})[/dim]"


# --------------------
# The table of edits one after the other.

_FORCED, _FREE = "teacher_forced", "free_generation"
_ROWS = (
    ("right after its edit: edit success", "right_after", _FORCED, "edit_success"),
    ("right after its edit: generalisation", "right_after", _FORCED, "generalisation"),
    ("asked again: edit success", "retained", _FORCED, "edit_success"),
    ("asked again: generalisation", "retained", _FORCED, "generalisation"),
    ("asked again: locality", "retained", _FORCED, "locality"),
    ("asked again, generated: edit success", "retained", _FREE, "edit_success"),
    ("asked again, generated: the target and no more", "retained", _FREE, "edit_success_full"),
    ("asked again, generated: generalisation", "retained", _FREE, "generalisation"),
    ("asked again, generated: locality", "retained", _FREE, "locality"),
)
"""Heading, when it was asked, protocol, score."""


def retention(figures: Mapping[str, Any]) -> None:
    """Print what is left of the edits as they become more, from what ``as_dict()`` of a sequence gives."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    points = figures["checkpoints"]
    table.add_column("one after the other; teacher forced or generated")
    for point in points:
        table.add_column(f"after {point['edits']:,}", justify="right")
    for heading, when, group, name in _ROWS:
        cells = [point[when].get(group, {}).get(name) for point in points]
        if any(cells):
            table.add_row(heading, *(_share(cell) for cell in cells))
    if any(point["refused"] is not None for point in points):
        table.add_row("edits that the guard refused", *(str(point["refused"]) for point in points))
    for name, clean in figures["clean"].items():
        values = [point["damage"].get(name) for point in points]
        table.add_row(f"{name.replace('_', ' ')} (clean {_number(clean)})", *map(_number, values))
    if any(point["relative_norm"] for point in points):
        table.add_row("size of all edits together", *(_size(point["relative_norm"]) for point in points))
    output().print(table)
    output().print(
        f"[dim]in brackets the 95% interval; {figures['seconds_per_edit']:.2f} s for an edit[/dim]"
    )
    harness(figures.get("lm_eval"))


def _share(cell: Mapping[str, float | None] | None) -> str:
    if cell is None or cell["mean"] is None:
        return "[dim]-[/dim]"
    return f"{cell['mean']:.1%} [dim]({cell['low']:.1%} to {cell['high']:.1%})[/dim]"


def _number(value: float | None) -> str:
    return "[dim]no number[/dim]" if value is None else f"{value:.4g}"


def _size(value: float | None) -> str:
    return "[dim]no number[/dim]" if value is None else f"{value:.2%}"
