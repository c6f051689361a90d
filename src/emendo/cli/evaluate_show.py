"""`emendo evaluate show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import emit

HELP = """Trace an evaluation's figures to its rows.

Prints the scores of a folder that emendo evaluate --out wrote, the records with the worst scores, or every answer of
one record: the prompt, the expected answer, and the model's answers before and after the edit. For edits made one after
the other, the answers are those after the last edit, or after N edits with --after.

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
    int | None, typer.Option("--worst", metavar="N", min=1, help="The N records with the worst scores.")
]
By = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="SCORE",
        help="The score that --worst ranks by: PROTOCOL.SCORE such as kl.locality, or perplexity.  [default: the mean "
        "of edit success, generalisation and locality]",
    ),
]
RecordId = Annotated[
    str | None,
    typer.Option("--record", metavar="ID", help="Every answer of the record with this id or number."),
]
After = Annotated[
    int | None,
    typer.Option(
        "--after",
        metavar="N",
        min=1,
        help="For edits made one after the other: the answers after N edits.  [default: the last]",
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
    from emendo.cli._tables import evaluation, print_table
    from emendo.errors import RequestError
    from emendo.evaluate import inspect
    from emendo.evaluate.evaluation import SequentialEvaluation
    from emendo.evaluate.run_folder import RunFolder
    from emendo.report import figures

    found = RunFolder.open(folder).found()
    if worst is None and by is None and record is None and after is None:
        emit(found.as_dict()) if as_json else evaluation(found.as_dict())
        return
    if isinstance(found, SequentialEvaluation):
        found = found.after(after)
    elif after is not None:
        raise RequestError(f"--after is for edits made one after the other; {folder} holds others.")
    if record is not None:
        one = inspect.record_of(found, record)
        emit(inspect.as_dict(one)) if as_json else print_table(figures.record(one))
    elif worst is not None or by is not None:
        rows = inspect.worst(found, worst or 20, by)
        if as_json:
            emit([{"value": value, **inspect.as_dict(result)} for result, value in rows])
        else:
            print_table(figures.worst(found, rows, by))
    else:
        emit(found.as_dict()) if as_json else evaluation(found.as_dict())
