"""`emendo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from emendo.cli import options as opt
from emendo.cli.console import emit, output

HELP = """Let a model go on from a prompt, without an edit and with it, side by side.

\b
Example:
  emendo generate --edit runs/demo/edit "The capital of Australia is"
"""

EditFolder = Annotated[
    Path, typer.Option("--edit", metavar="FOLDER", help="An edit: the --out folder of emendo edit.")
]
EditorFolder = Annotated[
    Path | None,
    typer.Option(
        "--editor",
        metavar="FOLDER",
        help="The editor that made the edit; needed where it trains the model itself (enn).",
    ),
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")]
Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="How many tokens to write, at most.")
]


def run(
    prompt: Prompt,
    edit: EditFolder,
    editor: EditorFolder = None,
    model: opt.SameModel = None,
    tokens: Tokens = 20,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Generate with and without an edit."""
    from emendo.cli.loading import load_editor, load_model
    from emendo.editors import read_edit
    from emendo.errors import RequestError

    if not prompt.strip():
        raise RequestError("The prompt is empty; give the text to continue.")
    change = read_edit(edit)
    if editor is None:
        lm = host = load_model(model or change.origin.model, dtype, device)
    else:
        lm, maker = load_editor(str(editor), model or change.origin.model, dtype, device)
        host = maker.host(lm)
    with change.applied(host) as edited:
        after = edited.generate(prompt, tokens)
    before = lm.generate(prompt, tokens)
    if as_json:
        emit({"prompt": prompt, "tokens": tokens, "before": before, "after": after})
        return
    console = output()
    console.print(f"[bold]without the edit[/bold]  {_line(prompt, before)}", soft_wrap=True)
    console.print(f"[bold]with the edit[/bold]     {_line(prompt, after)}", soft_wrap=True)


def _line(prompt: str, text: str) -> str:
    return f"[dim]{escape(prompt.rstrip())}[/dim] {escape(' '.join(text.split()))}"
