"""`emendo train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from emendo.cli import _options as opt
from emendo.cli import _train_options as own
from emendo.cli._console import emit, note, output

HELP = """Train an editor on facts, so that it can change others in one step.

The facts come from a file of records (JSON or JSONL; CounterFact and zsRE files are read too), each with a
prompt, a target and at least one paraphrase, or from the built-in facts (atlas). The model itself is not changed.
Ctrl-C saves the state and stops; --resume goes on from there, to the same result as a run that never stopped.

\b
Examples:
  emendo train --out runs/first --minutes 10
  emendo train --model ./my-model --data facts.jsonl --out runs/mine
  emendo train --resume --out runs/mine
"""


def run(
    ctx: typer.Context,
    out: own.Out,
    model: opt.Model = opt.MODEL,
    chat: opt.Chat = False,
    data: own.Data = "atlas",
    validation: own.Validation = None,
    text: own.Text = None,
    limit: own.Limit = None,
    skip_bad: own.SkipBad = False,
    dtype: opt.Dtype = "fastest",
    device: opt.Device = None,
    editor: opt.Method = "mend",
    rank: opt.Rank = None,
    settings: opt.Settings = None,
    sites: opt.Sites = None,
    last: opt.Last = None,
    steps: own.Steps = None,
    batch: own.Batch = None,
    together: own.Together = None,
    lr: own.Lr = None,
    minutes: own.Minutes = None,
    c_edit: own.CEdit = None,
    prompt_share: own.PromptShare = None,
    variety: own.Variety = None,
    near: own.Near = None,
    sibling: own.Sibling = None,
    unrelated: own.Unrelated = None,
    text_examples: own.TextExamples = None,
    warmup: own.Warmup = None,
    clip: own.Clip = None,
    seed: own.Seed = None,
    validate_every: own.ValidateEvery = None,
    validate_on: own.ValidateOn = None,
    patience: own.Patience = None,
    checkpoint_every: own.CheckpointEvery = None,
    overwrite: opt.Overwrite = False,
    resume: own.Resume = False,
    as_json: opt.AsJson = False,
) -> None:
    """Train an editor."""
    from emendo.cli._loading import load_model, named_dtype
    from emendo.cli._runs import new_run, resumed_run
    from emendo.cli._training import carry_out
    from emendo.errors import RequestError

    rest = ("out", "overwrite", "resume", "as_json")
    asked = {name: value for name, value in ctx.params.items() if name not in rest}
    asked["dtype"] = named_dtype(dtype, device)
    if resume and overwrite:
        raise RequestError(
            "--resume goes on with the run in --out and --overwrite replaces it: give one of them."
        )
    if resume:
        given = {name: value for name, value in asked.items() if _given(ctx, name)}
        the_run = resumed_run(out, given)
    else:
        the_run = new_run(out, asked, overwrite=overwrite)
    if the_run.finished:
        note(f"The run in {out} has already finished.")
    else:
        wanted = the_run.settings
        lm = load_model(wanted.model, wanted.dtype, wanted.device, chat=wanted.chat)
        the_run = carry_out(the_run, lm)
    if as_json:
        emit(dict(the_run.result))
    else:
        _show(the_run.result, out)


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


_STOPPED = {
    "finished": "all steps done",
    "early": "stopped early: the validation loss got no better",
    "time": "the time was up",
}


def _show(result: Mapping[str, Any], out: Path) -> None:
    console = output()
    minutes, seconds = divmod(round(result["seconds"]), 60)
    console.print(
        f"Trained on {result['records']} facts: {result['steps']} steps in {minutes} min {seconds} s "
        f"({_STOPPED[result['stopped']]})."
    )
    if result["skipped_steps"]:
        console.print(f"{result['skipped_steps']} steps were skipped for values that were not finite.")
    if best := result["validation"]:
        console.print(
            f"The best editor, of step {best['step']:.0f}, on {result['validation_records']} facts held out: "
            f"edit success {best['success']:.1%}, generalisation {best['generalisation']:.1%}, locality "
            f"{best['locality']:.1%}."
        )
    console.print(f"Saved in {out / 'editor'}. Make an edit with:", soft_wrap=True)
    console.print(f'  emendo edit --editor {out} "PROMPT" "TARGET" --out EDIT', soft_wrap=True)
