"""`emendo train`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from emendo._settings import settings_of
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output, silence
from emendo.train.config import TrainConfig

HELP = """Train an editor on facts, so that it can change other facts in one step.

The facts come from a file of records (JSON or JSONL; CounterFact and zsRE files are read too), each with a
prompt, a target and at least one paraphrase, or from the built-in facts (atlas). The model itself is not changed.
Ctrl-C saves the state and stops; --resume continues from there, with the same result as an uninterrupted run.

\b
Examples:
  emendo train --out runs/first --minutes 10
  emendo train --model ./my-model --data facts.jsonl --out runs/mine
  emendo train --preset mend/gpt2-xl --data completions.json --text passages.txt --out runs/xl
  emendo train --resume --out runs/mine
"""


Data = Annotated[str, typer.Option("--data", metavar="FILE", help="Training records: a file, or atlas.")]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation",
        metavar="FILE",
        help="Records that the best editor is chosen by.  [default: the last 2% of --data, which are then not trained "
        "on; for atlas its validation split]",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Plain text, a paragraph a line, on which the model must not change.  [default: text that a decoder "
        "writes itself]",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Use only the first N records.")]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave out malformed records and report their number, instead of stopping."
    ),
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="For a model larger than memory: leave its blocks in its files. The frozen ones are read once an epoch, "
        "one at a time; the edited ones, the embeddings and the vocabulary projection are in memory.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="METHOD/MODEL",
        help="Model, matrices and settings as in the MEND paper, such as mend/gpt-j-6b; an unknown name lists them "
        "all. Other options override it.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the run and its editor.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the stopped run in --out; needs no other option.")
]


def _with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each setting of a training run to a command that accepts ``**training``."""
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for each in settings_of(TrainConfig):
        option = typer.Option(
            each.flag,
            metavar="N" if each.kind is int else "X",
            help=f"{each.help}  [default: {each.shown_default}]",
            rich_help_panel="Training",
        )
        kind: Any = each.kind | None  # None: not given
        name = each.flag.removeprefix("--").replace("-", "_")
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
            )
        )
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@_with_training_options
def run(
    ctx: typer.Context,
    out: Out,
    preset: Preset = None,
    model: opt.Model = opt.MODEL,
    chat: opt.Chat = False,
    data: Data = "atlas",
    validation: Validation = None,
    text: Text = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    dtype: opt.Dtype = "fastest",
    device: opt.Device = None,
    offload: Offload = False,
    editor: opt.Method = "mend",
    rank: opt.Rank = None,
    settings: opt.Settings = None,
    sites: opt.Sites = None,
    last: opt.Last = None,
    overwrite: opt.Overwrite = False,
    resume: Resume = False,
    as_json: opt.AsJson = False,
    **training: Any,
) -> None:
    """Train an editor."""
    from emendo.cli._loading import load_model, named_dtype
    from emendo.cli._runs import new_run, resumed_run
    from emendo.cli._settings import with_preset
    from emendo.cli._training import carry_out
    from emendo.errors import RequestError
    from emendo.train.processes import World

    rest = ("out", "preset", "overwrite", "resume", "as_json")
    asked = {name: value for name, value in ctx.params.items() if name not in rest}
    given = {name: value for name, value in asked.items() if _given(ctx, name)}
    if preset is not None:
        given = with_preset(preset, given)
        asked |= given
    if resume and overwrite:
        raise RequestError(
            "--resume continues the run in --out and --overwrite replaces it: give one of them."
        )
    with World.present(device) as world:
        if not world.main:
            silence()
        asked["dtype"] = world.from_main(lambda: named_dtype(asked["dtype"], device))
        given |= {"dtype": asked["dtype"]} if "dtype" in given else {}
        if resume:
            the_run = resumed_run(out, given)
        else:  # the main process decides whether the folder may be replaced, and begins the run in it
            the_run = new_run(out, asked, overwrite=overwrite or not world.main)
        if the_run.finished:
            note(f"The run in {out} has already finished.")
        else:
            wanted = the_run.settings
            place = world.device(wanted.device)
            lm = load_model(wanted.model, wanted.dtype, place, chat=wanted.chat, offload=wanted.offload)
            the_run = carry_out(the_run, lm, world)
    if not world.main:
        return
    if as_json:
        emit(dict(the_run.result))
    else:
        _show(the_run.result, out)


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


_STOPPED = {
    "finished": "all steps done",
    "early": "stopped early: the validation score stopped improving",
    "time": "the time limit was reached",
}


def _show(result: Mapping[str, Any], out: Path) -> None:
    console = output()
    minutes, seconds = divmod(round(result["seconds"]), 60)
    console.print(
        f"Trained on {result['records']} facts: {result['steps']} steps in {minutes} min {seconds} s "
        f"({_STOPPED[result['stopped']]})."
    )
    if (count := result.get("processes", 1)) > 1:  # a run of before has none
        console.print(
            f"{count} processes, {result['episodes_per_second'] / count:.2f} episodes/s each; efficiency "
            f"{result['efficiency']:.0%} (the share of time not spent waiting for the others)."
        )
    if result["skipped_steps"]:
        console.print(f"{result['skipped_steps']} steps were skipped because a value was not finite.")
    if best := result["validation"]:
        console.print(
            f"The best editor, of step {best['step']:.0f}, on {result['validation_records']} facts held out: "
            f"edit success {best['success']:.1%}, generalisation {best['generalisation']:.1%}, locality "
            f"{best['locality']:.1%}."
        )
    console.print(f"Saved in {out / 'editor'}. Make an edit with:", soft_wrap=True)
    console.print(f'  emendo edit --editor {out} "PROMPT" "TARGET" --out EDIT', soft_wrap=True)
