"""`emendo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, output, warn_of_conflicts

HELP = """Continue a prompt without edits and with them, side by side.

The edits are those given, or else the active ones in the model's ledger.

\b
Examples:
  emendo generate --edit runs/demo/edit "The capital of Australia is"
  emendo generate --model ./my-model "The capital of Australia is"
"""

EditFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--edit", metavar="FOLDER", help="An edit: the --out folder of emendo edit (may be repeated)."
    ),
]
EditorFolder = Annotated[
    Path | None,
    typer.Option(
        "--editor",
        metavar="FOLDER",
        help="The editor that made the edit; needed where it trains the model itself (enn).",
    ),
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")]
Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="The largest number of tokens to generate.")
]


def run(
    prompt: Prompt,
    edit: EditFolders = None,
    editor: EditorFolder = None,
    model: opt.SameModel = None,
    chat: opt.SameChat = None,
    ledger: keep.Where = None,
    tokens: Tokens = 20,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Generate with and without edits."""
    from contextlib import ExitStack

    from emendo.cli._loading import load_editor, load_model
    from emendo.editors import read_edit
    from emendo.errors import RequestError

    if not prompt.strip():
        raise RequestError("The prompt is empty; give the text to continue.")
    if edit and ledger is not None:
        raise RequestError("Give --edit or --ledger, not both.")
    changes = [read_edit(folder) for folder in edit or ()]
    warn_of_conflicts(changes)
    name = model or (changes[0].origin.model if changes else opt.MODEL)
    if not changes:
        keep.find_ledger(name, ledger)  # fails before the model is loaded
    if editor is None:
        in_chat = any(change.origin.chat for change in changes) if chat is None else chat
        lm = host = load_model(name, dtype, device, chat=in_chat)
    else:
        lm, maker = load_editor(str(editor), name, dtype, device, chat=chat)
        host = maker.host(lm)
    with ExitStack() as stack:
        edited = host
        for change in changes:
            edited = stack.enter_context(change.applied(edited))
        if not changes:
            work = keep.open_workspace(host, ledger)
            if chat is None and work.ledger.has_chat_edits:
                lm = lm.reading(chat=True)
            edited = stack.enter_context(work.applied())
            if chat is None and work.ledger.has_chat_edits:
                edited = edited.reading(chat=True)
        after = edited.generate(prompt, tokens)
    before = lm.generate(prompt, tokens)
    if as_json:
        emit({"prompt": prompt, "tokens": tokens, "before": before, "after": after})
        return
    console = output()
    plural = "s" if len(changes) != 1 else ""
    console.print(_line(f"without the edit{plural}  ", prompt, before), soft_wrap=True)
    console.print(_line(f"with the edit{plural}     ", prompt, after), soft_wrap=True)


def _line(heading: str, prompt: str, text: str) -> Text:
    from emendo.models.framing import joined

    whole = joined(prompt, " ".join(text.split()))
    return Text.assemble((heading, "bold"), (prompt, "dim"), whole[len(prompt) :])
