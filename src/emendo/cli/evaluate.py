"""`emendo evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emendo.cli import options as opt
from emendo.cli.console import emit, note, working

HELP = """Measure an editor on the facts of a file.

Edits each fact, one at a time from the clean model. Prints edit success (the edited prompt), generalisation (its
rewordings) and locality (neighbours and unrelated prompts keep their answers), each with its 95% interval, teacher
forced and by free generation.

\b
Examples:
  emendo evaluate --editor runs/first --data facts.jsonl --limit 100
  emendo evaluate --editor runs/demo --data atlas --limit 100 --json
"""

Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="FILE", help="Records to measure on: a file, or atlas for its test split."
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="Use the first N records.  [default: all]")
]
Generated = Annotated[
    bool,
    typer.Option(
        "--generated/--no-generated",
        help="Measure free generation too, or not: it takes most of the time.  [default: generated]",
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", metavar="N", min=1, help="How many edits are measured at once.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed records out and say how many.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write a page with plots and every record (HTML)."),
]


def run(
    editor: opt.EditorFolder,
    data: Data = "atlas",
    model: opt.SameModel = None,
    limit: Limit = None,
    generated: Generated = True,
    batch: Batch = 25,
    skip_bad: SkipBad = False,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    report: Report = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure an editor."""
    from emendo.cli.loading import load_editor, read
    from emendo.cli.show import scores
    from emendo.evaluate import evaluate

    split = "test" if data == "atlas" else None
    records = read(data, split=split, limit=limit, skip_bad=skip_bad, need_paraphrase=False)
    lm, trained = load_editor(editor, model, dtype, device)
    with working() as work:
        found = evaluate(lm, trained, records, generated=generated, batch=batch, progress=work)
    if report is not None:
        from emendo.evaluate.report import write_report

        shown = {"command": _command(editor, data, limit, generated), "data": data, "editor": str(editor)}
        write_report(report, evaluation=found, info=shown)
        note(f"Wrote {report}.")
    if as_json:
        emit(found.as_dict())
    else:
        scores(found.as_dict())


def _command(editor: Path, data: str, limit: int | None, generated: bool) -> str:
    parts = ["emendo evaluate", f"--editor {editor}", f"--data {data}"]
    parts += [f"--limit {limit}"] if limit is not None else []
    return " ".join(parts + ([] if generated else ["--no-generated"]))
