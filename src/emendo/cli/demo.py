"""`emendo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import Interrupted, note, output

if TYPE_CHECKING:
    from emendo.cli._runs import Run

HELP = """Show the whole workflow: train an editor, make an edit, measure it, and write a report.

Trains a MEND editor on the built-in facts with a live view, changes one fact that it has not seen, shows the
answers before and after, measures the editor on other unseen facts, and writes the editor, the edit and
report.html. Takes less than ten minutes on two processor cores, and less than one when repeated, since the editor is
kept. Ctrl-C stops it at any time; the same command resumes it.

\b
Examples:
  emendo demo
  emendo demo --minutes 15 --out runs/longer
"""

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything is written.")]
Minutes = Annotated[float, typer.Option("--minutes", metavar="X", help="Minutes of training, at most.")]
Facts = Annotated[
    int, typer.Option("--facts", metavar="N", min=1, help="How many unseen facts to measure on.")
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Optimiser steps, at most.  [default: as emendo train]"),
]
Limit = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, help="Learn from the first N built-in facts.")
]


def run(
    out: Out = Path("runs/demo"),
    model: opt.Model = opt.MODEL,
    minutes: Minutes = 7.0,
    facts: Facts = 100,
    steps: Steps = None,
    limit: Limit = 2000,
    dtype: opt.Dtype = "fastest",
    device: opt.Device = None,
) -> None:
    """Run the demo."""
    from emendo.cli._demo import show_edit, show_scores
    from emendo.cli._loading import load_model, named_dtype
    from emendo.cli._training import carry_out
    from emendo.data import read_records
    from emendo.editors import Editor
    from emendo.models._fingerprint import same_model

    dtype = named_dtype(dtype, device)
    options = {
        "model": model,
        "data": "atlas",
        "editor": "mend",
        "minutes": minutes,
        "steps": steps,
        "limit": limit,
        "variety": 2,  # fewer texts to read, so more steps in the time there is
    }
    the_run = _open(out, {**options, "dtype": dtype, "device": device})
    lm = load_model(model, dtype, device)
    if the_run.finished and not same_model(the_run.result["fingerprint"], lm.fingerprint):
        note(f"The editor in {out} belongs to another model; training anew.")
        the_run = _anew(the_run)
    if the_run.finished:
        note(
            f"Using the editor in {the_run.editor}, which took {the_run.result['seconds'] / 60:.1f} minutes to train."
        )
    else:
        the_run = carry_out(the_run, lm)
    try:
        editor = Editor.from_pretrained(the_run.editor).to(lm.device)
        unseen = read_records("atlas", split="test")
        edit, rows = show_edit(the_run, lm, editor, unseen)
        show_scores(the_run, lm, editor, unseen[:facts], edit, rows)
    except KeyboardInterrupt:
        raise Interrupted(
            f"the editor is kept in {the_run.editor}. Continue with: emendo demo --out {out}"
        ) from None
    _what_next(the_run, edit.origin.requests[0].prompt)


def _open(out: Path, options: dict[str, object]) -> Run:
    """The demo's run: the one in the folder, finished or not, if it has the same settings; else a new one."""
    from emendo._runs import has_run
    from emendo.cli._runs import Run, new_run

    new = new_run(out, options, overwrite=True, command="demo")
    if not has_run(out):
        return new
    old = Run.open(out)
    if old.settings == new.settings:
        return old
    note(f"The editor in {out} was trained with other settings; training anew.")
    return new


def _anew(old: Run) -> Run:
    from emendo.cli._runs import new_run

    return new_run(old.folder, old.options, overwrite=True, command="demo")


def _what_next(run: Run, prompt: str) -> None:
    out = run.folder
    console = output()
    console.print("\nWhat next", style="bold")
    for line in (
        f'emendo generate --edit {out / "edit"} "{prompt}"',
        f'emendo edit --editor {out} "The capital of France is" "Lyon" --out {out / "my-edit"}',
        "emendo train --model MODEL --data FILE --out runs/mine",
    ):
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"\nThe report, with plots and every fact: {out / 'report.html'}", soft_wrap=True)
