"""`emendo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import Interrupted, note, output

if TYPE_CHECKING:
    from emendo.cli._demo import Demo
    from emendo.cli._runs import Run
    from emendo.models.lm import LM

HELP = """Show the whole workflow: make an edit, measure the editor on facts it has not seen, and write a report.

Changes one fact of the built-in model with the trained editor that ships with emendo, shows the answers before and
after, measures the editor on unseen facts, and writes the edit and report.html. With --train it first trains an editor
of its own on the built-in facts, with a live view; that takes minutes, Ctrl-C stops it at any time, and the same
command resumes it.

\b
Examples:
  emendo demo
  emendo demo --train
  emendo demo --train --minutes 15 --out runs/longer
"""

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Where everything is written.  [default: runs/demo, with --train runs/demo-trained]",
    ),
]
Train = Annotated[
    bool, typer.Option("--train", help="Train an editor first; --minutes, --steps and --limit imply it.")
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="X", help="Minutes of training, at most.  [default: 7]"),
]
Facts = Annotated[
    int | None,
    typer.Option(
        "--facts",
        metavar="N",
        min=1,
        help="How many unseen facts to measure on.  [default: 20, with --train 100]",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Optimiser steps, at most.  [default: as emendo train]"),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, help="Learn from the first N built-in facts.  [default: 2000]"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Number format of the model.  [default: float32, which gives the same figures everywhere; with --train "
        "fastest]",
    ),
]


def run(
    out: Out = None,
    train: Train = False,
    model: opt.Model = opt.MODEL,
    minutes: Minutes = None,
    facts: Facts = None,
    steps: Steps = None,
    limit: Limit = None,
    dtype: Dtype = None,
    device: opt.Device = None,
) -> None:
    """Run the demo."""
    from emendo._outputs import DEMO
    from emendo.cli._demo import of_entry, show_edit, show_scores
    from emendo.cli._loading import load_model
    from emendo.cli._paths import claim
    from emendo.data import read_records
    from emendo.editors import Editor, library

    asked = train or any(option is not None for option in (minutes, steps, limit))
    options = {
        "model": model,
        "data": "atlas",
        "editor": "mend",
        "minutes": 7.0 if minutes is None else minutes,
        "steps": steps,
        "limit": 2000 if limit is None else limit,
        "variety": 2,  # fewer texts to read, so more steps in the time there is
    }
    entry = None
    if not asked:
        claim(out or Path("runs/demo"), DEMO, model=model, overwrite=True)  # before the model is loaded
        lm = load_model(model, dtype or "float32", device)
        entry = library.shipped_for(lm.fingerprint)
        if entry is None:
            note(f"No trained editor ships for {model}, so one is trained first.")
    train = entry is None
    if entry is None:
        lm, demo = _trained(out or Path("runs/demo-trained"), options, dtype or "fastest", device)
    else:
        demo = of_entry(entry, out or Path("runs/demo"), model)
    count = facts or (100 if train else 20)
    try:
        editor = Editor.from_pretrained(demo.editor).to(lm.device)
        unseen = read_records("atlas", split="test")
        edit, rows = show_edit(demo, lm, editor, unseen)
        show_scores(demo, lm, editor, unseen[:count], edit, rows)
    except KeyboardInterrupt:
        kept = f"the editor is kept in {demo.editor}. " if train else ""
        again = f"emendo demo{' --train' if train else ''} --out {demo.folder}"
        raise Interrupted(f"{kept}Continue with: {again}") from None
    _what_next(demo, edit.origin.requests[0].prompt, trained=train)


def _trained(out: Path, options: dict[str, object], dtype: str, device: str | None) -> tuple[LM, Demo]:
    """The model, and the demo of an editor that is trained now or was trained earlier in the same folder."""
    from emendo.cli._demo import of_run
    from emendo.cli._loading import load_model, named_dtype
    from emendo.cli._training import carry_out
    from emendo.models._fingerprint import same_model

    dtype = named_dtype(dtype, device)
    run = _open(out, {**options, "dtype": dtype, "device": device})
    lm = load_model(str(options["model"]), dtype, device)
    if run.finished and not same_model(run.result["fingerprint"], lm.fingerprint):
        note(f"The editor in {out} belongs to another model; training anew.")
        run = _anew(run)
    if run.finished:
        note(
            f"Using the editor in {run.editor}, which took {run.result['seconds'] / 60:.1f} minutes to train."
        )
    else:
        run = carry_out(run, lm)
    return lm, of_run(run)


def _open(out: Path, options: dict[str, object]) -> Run:
    """The demo's run: the one in the folder, finished or not, if it has the same settings; else a new one."""
    from emendo._outputs import DEMO
    from emendo._runs import has_run, read_run
    from emendo.cli._runs import Run, new_run

    new = new_run(out, options, overwrite=True, command="demo")
    if not has_run(out) or "model" not in read_run(out, DEMO, "")["settings"]:  # a demo that trained nothing
        return new
    old = Run.open(out)
    if old.settings == new.settings:
        return old
    note(f"The editor in {out} was trained with other settings; training anew.")
    return new


def _anew(old: Run) -> Run:
    from emendo.cli._runs import new_run

    return new_run(old.folder, old.options, overwrite=True, command="demo")


def _what_next(demo: Demo, prompt: str, *, trained: bool) -> None:
    out = demo.folder
    console = output()
    console.print("\nWhat next", style="bold")
    editor = f"--editor {out} " if trained else ""
    for line in (
        f'emendo generate --edit {out / "edit"} "{prompt}"',
        f'emendo edit {editor}"The capital of France is" "Lyon" --out {out / "my-edit"}',
        "emendo train --model MODEL --data FILE --out runs/mine",
    ):
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"\nThe report, with plots and every fact: {out / 'report.html'}", soft_wrap=True)
