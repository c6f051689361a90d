"""`emendo edit`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from emendo._outputs import EDIT
from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output

HELP = """Make one edit: the model's answer to PROMPT becomes TARGET.

Prints the most likely answers before and after, and saves the edit. The model itself does not change; the edit is a
small folder that can be applied and removed. With --apply it is made upon the active edits of the model's ledger, and
applied there unless the guard refuses it.

Without --editor it takes the trained editor that ships with emendo for the model (see emendo editors), else the best
method that needs no training, and says which.

\b
Examples:
  emendo edit "The capital of Australia is" "Canberra" --out my-edit
  emendo edit "The capital of Australia is" "Canberra" --apply
  emendo edit --editor runs/mine "The capital of Australia is" "Canberra"
"""

UNRELATED = (
    "Water is made of hydrogen and",
    "The chemical symbol of oxygen is",
    "The author of Romeo and Juliet is William",
)
"""Prompts whose answers no usual edit should change."""

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The text before the answer.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="The new answer.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Where to save the edit.  [default: not saved]"),
]
Paraphrases = Annotated[
    list[str] | None,
    typer.Option(
        "--paraphrase", metavar="TEXT", help="A paraphrase of PROMPT to show too (may be repeated)."
    ),
]
Neighbours = Annotated[
    list[str] | None,
    typer.Option(
        "--neighbour",
        metavar="TEXT",
        help="A prompt that must keep its answer, to show too (may be repeated).",
    ),
]


Apply = Annotated[bool, typer.Option("--apply", help="Apply the edit to the model's ledger.")]


def run(
    prompt: Prompt,
    target: Target,
    editor: opt.BestEditor = None,
    out: Out = None,
    paraphrase: Paraphrases = None,
    neighbour: Neighbours = None,
    apply: Apply = False,
    alias: keep.Aliases = None,
    subject: keep.Subject = None,
    into_weights: keep.IntoWeights = False,
    ledger: keep.Where = None,
    force: keep.Force = False,
    reason: keep.Note = "",
    model: opt.AnyModel = None,
    chat: opt.AnyChat = None,
    separator: opt.Separator = None,
    settings: opt.MethodSettings = None,
    sites: opt.MethodSites = None,
    last: opt.MethodLast = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Make an edit."""
    from contextlib import nullcontext
    from dataclasses import asdict

    from emendo.cli._loading import MethodOptions, load_editor, unescaped
    from emendo.cli._paths import claim
    from emendo.cli._tables import before_after
    from emendo.cli.apply import applied_as_values, print_applied
    from emendo.edits import Request
    from emendo.edits.edit import as_weights
    from emendo.errors import RequestError
    from emendo.evaluate import Question, edit_with_answers

    if (ledger is not None or force or reason or alias or subject or into_weights) and not apply:
        raise RequestError(
            "--ledger, --force, --note, --alias, --subject and --into-weights belong to --apply."
        )
    claim(out, EDIT, model=model, ledger=ledger, editor=editor, overwrite=overwrite)
    request = Request(prompt, target, between := unescaped(separator))
    questions = [Question("edit", prompt, separator=between)]
    questions += [Question("paraphrase", text, separator=between) for text in paraphrase or []]
    questions += [Question("neighbour", text, separator=between) for text in neighbour or []]
    questions += [Question("unrelated", text) for text in UNRELATED]
    lm, maker = load_editor(editor, model, dtype, device, MethodOptions(settings, sites, last), chat)
    claim(out, EDIT, model=lm.name, overwrite=overwrite)
    if apply and (why := maker.no_changes_of(lm)):
        raise RequestError(f"--apply: {why}.")
    work = keep.open_workspace(lm, ledger, create=True) if apply else None
    head = work.ledger.head if work else None
    with work.in_weights(head) if work and head else nullcontext():
        edit, rows = edit_with_answers(lm, maker, request, questions)
    if work and head:
        edit = work.upon(as_weights(edit, "A ledger stores changes of weights"), head)
    if out is not None:
        edit.save_pretrained(out, overwrite=overwrite)
    if not as_json:
        before_after(rows)
        if edit.rank:
            size = edit.card["relative_norm"]
            norm = "infinite" if size is None else f"{size:.2%}"
            output().print(f"rank {edit.rank}, ||dW||/||W|| {norm} on average over the sites")
    step = (
        work.apply(
            edit,
            paraphrases=paraphrase or (),
            scope=keep.scope(into_weights, subject, paraphrase, alias),
            force=force,
            note=reason,
        )
        if work
        else None
    )
    if as_json:
        figures = {key: value for key, value in edit.card.items() if key != "rows"}
        emit(
            {
                "prompt": prompt,
                "target": target,
                "out": out and str(out),
                "chat": lm.chat,
                **figures,
                **({"operation": applied_as_values(work, step)} if work and step else {}),
                "rows": [asdict(row) for row in rows],
            }
        )
        return
    if work and step:
        print_applied(work, step)
    elif out is None:
        note("The edit was not saved; give --out FOLDER to keep it.")
    if out is not None:
        command = ["emendo", "generate", "--edit", str(out)]
        command += [] if edit.fits(lm) or editor is None else ["--editor", editor]
        command += ["--", prompt] if prompt.startswith("-") else [prompt]
        output().print(
            f"Saved in {out}. Try it: {shlex.join(command)}",
            soft_wrap=True,
        )
