"""`emendo evaluate show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import emit, output

if TYPE_CHECKING:
    from emendo.evaluate import Evaluation, Outcome, Result

HELP = """Trace an evaluation's figures to its rows.

Prints the scores of a folder that emendo evaluate --out wrote, the records that did worst, or every answer of one
record: what was asked, what was expected, what was said before and after the edit. Of edits one after the other, the
records are shown as they were asked again after the last edit, or after N with --after.

\b
Examples:
  emendo evaluate show runs/measured
  emendo evaluate show runs/measured --worst 20
  emendo evaluate show runs/measured --worst 5 --by perplexity
  emendo evaluate show runs/measured --record 1042
  emendo evaluate show runs/sequence --after 100 --worst 20
"""

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the evaluation.")]
Worst = Annotated[
    int | None, typer.Option("--worst", metavar="N", min=1, help="The N records that did worst.")
]
By = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="SCORE",
        help="What --worst goes by: PROTOCOL.SCORE such as kl.locality, or perplexity.  [default: the mean of edit "
        "success, generalisation and locality]",
    ),
]
RecordId = Annotated[
    str | None,
    typer.Option("--record", metavar="ID", help="Every answer of the record of that id, or number."),
]
After = Annotated[
    int | None,
    typer.Option(
        "--after",
        metavar="N",
        min=1,
        help="Of edits one after the other: the records as they were asked again after N.  [default: the last]",
    ),
]


def run(
    folder: Folder,
    worst: Worst = None,
    by: By = None,
    record: RecordId = None,
    after: After = None,
    as_json: opt.AsJson = False,
) -> None:
    """Trace figures to rows."""
    from emendo.cli._tables import scores
    from emendo.errors import RequestError
    from emendo.evaluate import inspect as tracing
    from emendo.evaluate.run_folder import RunFolder
    from emendo.evaluate.sequential import Sequential

    found = RunFolder.open(folder).found()
    if isinstance(found, Sequential):
        from emendo.cli._tables import retention

        if worst is None and by is None and record is None and after is None:
            emit(found.as_dict()) if as_json else retention(found.as_dict())
            return
        found = found.after(after)
    elif after is not None:
        raise RequestError(f"{folder} holds edits that were not made one after the other; leave --after out.")
    if record is not None:
        one = tracing.record_of(found, record)
        emit(tracing.as_dict(one)) if as_json else _record(one)
    elif worst is not None or by is not None:
        rows = tracing.worst(found, worst or 20, by)
        if as_json:
            emit([{"value": value, **tracing.as_dict(result)} for result, value in rows])
        else:
            _worst(found, rows, by)
    else:
        emit(found.as_dict()) if as_json else scores(found.as_dict())


def _worst(found: Evaluation, rows: list[tuple[Result, float]], by: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("record", "prompt", "target", "before", "after", by or "mean"):
        table.add_column(name, overflow="fold")
    for result, value in rows:
        edit = result.outcomes[0]
        name = result.record.id or str(found.results.index(result) + 1)
        cells = (name, edit.prompt, edit.answer, _said(edit, "before"), _said(edit, "after"))
        table.add_row(*map(escape, cells), f"{value:.4g}")
    output().print(table)


def _record(result: Result) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("asked", "expected", "before", "after", ""):
        table.add_column(name, overflow="fold")
    kind = None
    for outcome in result.outcomes:
        if outcome.kind != kind:
            kind = outcome.kind
            table.add_row(f"[bold]{kind.replace('_', ' ')}[/bold]")
        expected = f"{outcome.answer}, unchanged" if outcome.local else outcome.answer
        good = outcome.teacher_forced if outcome.generated is None else outcome.generated
        cells = (outcome.prompt, expected, _said(outcome, "before"), _said(outcome, "after"))
        table.add_row(*map(escape, cells), "[green]✓[/green]" if good else "[red]✗[/red]")
    output().print(table)
    figures = {"rank": result.rank, "size": f"{result.norm:.3%}", "seconds": f"{result.seconds:.3f}"}
    figures |= {name.replace("_", " "): f"{value:.4g}" for name, value in result.damage.items()}
    output().print("[dim]" + "; ".join(f"{name} {value}" for name, value in figures.items()) + "[/dim]")


def _said(outcome: Outcome, side: str) -> str:
    """What was said, and how likely and how far up the answer was."""
    from emendo.evaluate.inspect import answer

    text = answer(outcome, side)
    rank = getattr(outcome, f"rank_{side}")
    place = "" if rank is None else f", rank {rank:,}"
    chance = f"P {getattr(outcome, side):.3g}{place}"
    return chance if text is None else f"{text}\n({chance})"
