"""`emendo why`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from emendo.cli import _ledger as shared
from emendo.cli import _options as opt
from emendo.cli._console import emit, output

if TYPE_CHECKING:
    from emendo.ledger import Ledger

HELP = """Show which edit of a model's memory answers a prompt, and why.

The score of an edit is from 0 to 1: the words that the prompt shares with the edit's own, its subject, and the
similarity of what the model makes of both. From the threshold on an edit answers; below it the base model does.

\b
Examples:
  emendo why "What is the capital of Australia?"
  emendo why "What is the capital of Australia?" --model ./my-model --json
"""

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")]


def run(
    prompt: Prompt,
    model: opt.Model = opt.MODEL,
    ledger: shared.Where = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show a choice."""
    from emendo.cli._loading import load_model
    from emendo.errors import RequestError

    if not prompt.strip():
        raise RequestError("The prompt is empty.")
    shared.find_ledger(model, ledger)  # fails before the model is loaded
    work = shared.open_workspace(load_model(model, dtype, device), ledger)
    choice = work.memory().why(prompt)
    if as_json:
        emit(asdict(choice))
        return
    console = output()
    if choice.edit is None:
        console.print("No edit of the memory answers: the base model does.", soft_wrap=True)
    else:
        console.print(_line("answered by", work.ledger, choice.edit, choice.score), soft_wrap=True)
    if choice.edit is None and choice.best is not None:
        console.print(_line("nearest", work.ledger, choice.best, choice.score), soft_wrap=True)
    if choice.runner_up is not None:
        console.print(
            _line("runner-up", work.ledger, choice.runner_up, choice.runner_up_score), soft_wrap=True
        )
    console.print(f"threshold {choice.threshold:.3f}", style="dim")


def _line(heading: str, ledger: Ledger, edit: int, score: float) -> Text:
    line = Text.assemble((heading, "bold"), f" edit {edit} at {score:.3f}: ")
    return line.append(shared.requests_line(ledger.entry(edit)))
