"""`emendo apply`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output

if TYPE_CHECKING:
    from emendo.ledger import Operation
    from emendo.ledger.workspace import Workspace

HELP = """Put edits into a model's ledger, each on top of those that are active, if the guard lets it.

The guard asks the edited model: is the target the answer, to the rewordings too; do prompts that have nothing to do
with the edit keep their answers; does plain text stay as likely; how large is the change. What is beyond the limits is
refused, unless --force is given. The model's files are never touched: the working model is its base and the active
edits, put together when it is loaded (emendo generate --ledger, emendo export --ledger).

\b
Examples:
  emendo apply my-edit
  emendo apply my-edit --paraphrase "Australia's capital city is" --limit perplexity=1.02
"""

Edits = Annotated[
    list[Path], typer.Argument(metavar="EDIT...", help="Edits: the --out folders of emendo edit.")
]


def run(
    edits: Edits,
    model: opt.SameModel = None,
    ledger: keep.Where = None,
    paraphrase: keep.Paraphrases = None,
    force: keep.Force = False,
    by: keep.By = None,
    reason: keep.Note = "",
    probes: keep.Probes = None,
    passage: keep.Passage = None,
    limit: keep.Limit = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Apply edits."""
    from emendo.cli._loading import load_model
    from emendo.editors import read_edit
    from emendo.errors import RequestError

    changes = [read_edit(folder) for folder in edits]
    if paraphrase and len(changes) > 1:
        raise RequestError("--paraphrase belongs to one edit; apply them one by one.")
    lm = load_model(model or changes[0].origin.model, dtype, device)
    work = keep.open_workspace(lm, ledger, create=True, probes=probes, passage=passage, limits=limit)
    done = []
    for change in changes:
        step = work.apply(change, paraphrases=paraphrase or (), force=force, by=by, note=reason)
        done.append(step)
        if not as_json:
            say_applied(work, step)
    if as_json:
        emit({"ledger": work.ledger.where, "operations": [as_values(step) for step in done]})


def say_applied(work: Workspace, step: Operation) -> None:
    """Print what was applied and what the guard found."""
    console = output()
    entry = work.ledger.entry(step.edits[0])
    console.print(f"[green]applied[/green] edit {entry.id}: {keep.wishes(entry)}", soft_wrap=True)
    console.print(f"[dim]{keep.figures_of(step.health)}[/dim]", soft_wrap=True)
    if step.forced and step.health:
        note(f"The guard refused it, and it was forced: {'; '.join(step.health['problems'])}.")
    console.print(keep.say_state(step), soft_wrap=True)


def as_values(step: Any) -> dict[str, Any]:
    """An operation as JSON values."""
    from dataclasses import asdict

    return asdict(step)
