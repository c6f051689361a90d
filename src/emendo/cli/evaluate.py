"""`emendo evaluate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo.cli import options as opt
from emendo.cli.console import emit, note, working

if TYPE_CHECKING:
    from emendo.cli.loading import MethodOptions

HELP = """Measure an editor on the facts of a file.

Edits each fact, one at a time from the clean model. Prints edit success (the edited prompt), generalisation (its
rewordings) and locality (neighbours and unrelated prompts keep their answers), each with its 95% interval, teacher
forced and by free generation.

\b
Examples:
  emendo evaluate --editor runs/first --data facts.jsonl --limit 100
  emendo evaluate --editor runs/demo --data atlas --limit 100 --json
  emendo evaluate --editor cache --set radius=2.5 --model ./my-model --data facts.jsonl
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
    editor: opt.AnyEditor,
    data: Data = "atlas",
    model: opt.AnyModel = None,
    settings: opt.MethodSettings = None,
    sites: opt.MethodSites = None,
    last: opt.MethodLast = None,
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
    from emendo.cli.loading import MethodOptions, load_editor, read
    from emendo.cli.show import scores
    from emendo.evaluate import evaluate

    split = "test" if data == "atlas" else None
    records = read(data, split=split, limit=limit, skip_bad=skip_bad, need_paraphrase=False)
    method = MethodOptions(settings, sites, last)
    lm, maker = load_editor(editor, model, dtype, device, method)
    with working() as work:
        found = evaluate(lm, maker, records, generated=generated, batch=batch, progress=work)
    if report is not None:
        from emendo.evaluate.report import write_report

        command = _command(editor, data, limit, generated, method)
        shown = {"command": command, "data": data, "editor": editor}
        write_report(report, evaluation=found, info=shown)
        note(f"Wrote {report}.")
    if as_json:
        emit(found.as_dict())
    else:
        scores(found.as_dict())


def _command(editor: str, data: str, limit: int | None, generated: bool, method: MethodOptions) -> str:
    parts = ["emendo evaluate", f"--editor {editor}", f"--data {data}"]
    parts += [f"--set {shlex.quote(pair)}" for pair in method.settings or ()]
    parts += [f"--sites {shlex.quote(which)}" for which in method.sites or ()]
    parts += [f"--last {method.last}"] if method.last is not None else []
    parts += [f"--limit {limit}"] if limit is not None else []
    return " ".join(parts + ([] if generated else ["--no-generated"]))
