"""`emendo apply`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output

if TYPE_CHECKING:
    from emendo.ledger import Entry, Operation
    from emendo.ledger.workspace import Workspace

HELP = """Apply edits to a model's ledger, if the guard admits them.

An edit goes into the model's memory: a prompt that asks for its fact is answered with it, and every other prompt as
without it, so that any number of edits can be active (emendo why PROMPT shows which one answers). With --into-weights
it is added to the weights, on top of those that are there.
The guard tests the edited model: is the target the answer, to paraphrases too; do unrelated prompts keep their answers;
does plain text stay as likely; how large is the change. An edit beyond the limits is refused, unless --force is given.
The model's files are never changed: the working model is put together when it is loaded (emendo generate --ledger).

\b
Examples:
  emendo apply my-edit
  emendo apply my-edit --alias "Down Under"
  emendo apply my-edit --paraphrase "Australia's capital city is" --limit perplexity=1.02
"""

Edits = Annotated[
    list[Path], typer.Argument(metavar="EDIT...", help="Edits: the --out folders of emendo edit.")
]


def run(
    edits: Edits,
    model: opt.SameModel = None,
    ledger: shared.Where = None,
    paraphrase: shared.Paraphrases = None,
    alias: shared.Aliases = None,
    subject: shared.Subject = None,
    into_weights: shared.IntoWeights = False,
    force: shared.Force = False,
    by: shared.By = None,
    reason: shared.Note = "",
    probes: shared.Probes = None,
    passage: shared.Passage = None,
    limit: shared.Limit = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Apply edits."""
    from emendo.cli._loading import load_model
    from emendo.editors import read_edit
    from emendo.errors import RequestError

    changes = [read_edit(folder) for folder in edits]
    if (paraphrase or alias or subject) and len(changes) > 1:
        raise RequestError("--paraphrase, --alias and --subject belong to one edit; apply them one by one.")
    scope = shared.scope(into_weights, subject, paraphrase, alias)
    lm = load_model(model or changes[0].origin.model, dtype, device)
    work = shared.open_workspace(lm, ledger, create=True, probes=probes, passage=passage, limits=limit)
    operations = []
    for change in changes:
        step = work.apply(change, paraphrases=paraphrase or (), scope=scope, force=force, by=by, note=reason)
        if as_json:
            operations.append(applied_as_values(work, step))
        else:
            print_applied(work, step)
    if as_json:
        emit({"ledger": work.ledger.where, "operations": operations})


def print_applied(work: Workspace, step: Operation) -> None:
    """Print an edit that was applied, the guard's figures, and a warning if its fact was edited before."""
    console = output()
    entry = work.ledger.entry(step.edits[0])
    line = Text.assemble(("applied", "green"), f" edit {entry.id}: ", shared.requests_line(entry))
    console.print(line, soft_wrap=True)
    console.print(shared.health_line(step.health), style="dim", soft_wrap=True)
    if step.forced and step.health:
        note(f"The guard refused it, and it was forced: {'; '.join(step.health['problems'])}.")
    if captured := (step.health or {}).get("captured"):
        taken = ", ".join(map(str, captured))
        note(
            Text.assemble(
                ("Warning:", "yellow"), f" it also answers the prompts of other edits in the memory: {taken}."
            )
        )
    for other in _edited_before(work, step):
        line = Text.assemble(("Warning:", "yellow"), f" edit {other.id} is active and has the same prompt: ")
        line.append(shared.requests_line(other))
        note(line.append(f". The later one wins; to take the earlier one off: emendo revert {other.id}"))
    console.print(shared.state_line(step), soft_wrap=True)


def applied_as_values(work: Workspace, step: Operation) -> dict[str, Any]:
    """An operation that applied an edit as JSON values, with the active edits that have the same prompt."""
    return {**step.as_dict(), "same_prompt_as": [entry.id for entry in _edited_before(work, step)]}


def _edited_before(work: Workspace, step: Operation) -> list[Entry]:
    """The other active edits with a prompt of the edit that was applied."""
    entry = work.ledger.entry(step.edits[0])
    return [e for e in work.ledger.with_same_prompts(entry.requests, step.id) if e.id != entry.id]
