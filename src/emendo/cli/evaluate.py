"""`emendo evaluate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from emendo._outputs import EVALUATION, REPORT
from emendo.cli import _options as opt
from emendo.cli._console import emit, note

HELP = """Measure an editor on the facts of a file.

Edits each fact, one at a time from the clean model, or k at once, one after the other, or all in one memory, where the
prompt decides which edit is in force (--routed). Prints edit success (the
edited prompt), generalisation (its paraphrases) and locality (neighbours and unrelated prompts keep their answers),
each with its 95% interval, teacher forced and by free generation, and the damage to plain text. With --out every raw
answer is kept, with a report; the same command resumes a stopped run.

\b
Examples:
  emendo evaluate --editor runs/first --data facts.jsonl --limit 100
  emendo evaluate --editor runs/demo --data atlas --limit 100 --json
  emendo evaluate --editor cache --set radius=2.5 --model ./my-model --data facts.jsonl
  emendo evaluate --editor runs/first --data facts.jsonl --out runs/first-measured
  emendo evaluate --editor runs/first --data facts.jsonl --sequential --no-generated
  emendo evaluate --routed --data facts.jsonl --limit 1000
"""

Data = Annotated[
    str,
    typer.Option("--data", metavar="FILE", help="The records: a file, or atlas for its test split."),
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="Use the first N records.  [default: all]")
]
Generated = Annotated[
    bool,
    typer.Option(
        "--generated/--no-generated",
        help="Score free generation too, which takes most of the time, or not.  [default: generated]",
    ),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="The number of edits at once.")]
Together = Annotated[
    int, typer.Option("--together", metavar="K", min=1, help="The number of facts in one edit.")
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential",
        help="Make each edit in the model with all earlier ones, and ask all facts so far again at checkpoints.",
    ),
]
Routed = Annotated[
    bool,
    typer.Option(
        "--routed",
        help="Put all edits into one memory and ask all prompts: each is answered under the edit in whose scope it is.",
    ),
]
FalseFires = Annotated[
    float,
    typer.Option(
        "--false-fires",
        metavar="SHARE",
        min=0,
        max=1,
        help="With --routed: the share of the prompts about other subjects that may fire an edit.",
    ),
]
Subjects = Annotated[
    bool,
    typer.Option(
        "--subjects",
        help="With --routed: tell the memory the subjects that the records name.  [default: they are guessed]",
    ),
]
AskAfter = Annotated[
    list[int] | None,
    typer.Option(
        "--ask-after",
        metavar="N",
        min=1,
        help="With --sequential: a checkpoint, as a number of edits (may be repeated).  "
        "[default: 1, 10, 100, 1000, and after the last]",
    ),
]
Damage = Annotated[
    bool,
    typer.Option(
        "--damage/--no-damage",
        help="Measure plain text, abilities and long continuations too, or not; decoders only.  [default: damage]",
    ),
]
Guard = Annotated[
    bool,
    typer.Option(
        "--guard",
        help="With --sequential: remove an edit again that the guard of emendo apply would refuse.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Plain text for the perplexity, one paragraph a line; the first 8 are read.  [default: built in]",
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASK[,TASK]",
        help="Tasks of the evaluation harness (lm-eval), run on the clean model and on the one with the edits: all of "
        "--sequential, or the first of --together.",
    ),
]
LmEvalLimit = Annotated[
    int | None,
    typer.Option(
        "--lm-eval-limit", metavar="N", min=1, help="Run the first N questions of each task.  [default: all]"
    ),
]
LmEvalTasks = Annotated[
    Path | None,
    typer.Option("--lm-eval-tasks", metavar="DIR", help="A folder with your own task files (YAML)."),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave malformed records out, with a note of their number.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Keep every raw answer (Parquet), a report and a summary in this folder."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Also write a page with plots and every record (HTML); an older page of emendo is replaced.",
    ),
]


def run(
    editor: opt.BestEditor = None,
    data: Data = "atlas",
    model: opt.AnyModel = None,
    chat: opt.AnyChat = None,
    separator: opt.Separator = None,
    settings: opt.MethodSettings = None,
    sites: opt.MethodSites = None,
    last: opt.MethodLast = None,
    limit: Limit = None,
    generated: Generated = True,
    batch: Batch = 25,
    together: Together = 1,
    sequential: Sequential = False,
    routed: Routed = False,
    false_fires: FalseFires = 0.02,
    subjects: Subjects = False,
    ask_after: AskAfter = None,
    damage: Damage = True,
    guard: Guard = False,
    text: Text = None,
    lm_eval: LmEval = None,
    lm_eval_limit: LmEvalLimit = None,
    lm_eval_tasks: LmEvalTasks = None,
    skip_bad: SkipBad = False,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    out: Out = None,
    overwrite: opt.Overwrite = False,
    report: Report = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure an editor."""
    from emendo.cli._evaluate import EvaluateOptions, Job, harness, write_page
    from emendo.cli._loading import MethodOptions, load_editor, read, readable, separated_by
    from emendo.cli._paths import claim
    from emendo.cli._tables import evaluation
    from emendo.data.portability import with_consequences
    from emendo.evaluate.sequential import RETENTION
    from emendo.train.processes import World

    command = _command(
        editor=editor,
        data=data,
        model=model,
        **{"no-chat" if chat is False else "chat": chat is not None},
        separator=separator,
        set=settings,
        sites=sites,
        last=last,
        limit=limit,
        batch=None if batch == 25 else batch,
        together=None if together == 1 else together,
        sequential=sequential,
        routed=routed,
        false_fires=None if false_fires == 0.02 else false_fires,
        subjects=subjects,
        ask_after=ask_after,
        guard=guard,
        text=text,
        lm_eval=lm_eval,
        lm_eval_limit=lm_eval_limit,
        lm_eval_tasks=lm_eval_tasks,
        out=out,
        **{"no-generated": not generated, "no-damage": not damage},
    )
    read_too = [data, text, lm_eval_tasks]
    team = World.present(device)
    if team.main:  # the others may find the folder that the first one is about to fill
        # an older evaluation is resumed, or replaced later on
        claim(out, EVALUATION, model=model, editor=editor, inputs=read_too, overwrite=True)
        claim(report, REPORT, model=model, editor=editor, inputs=read_too)
    tasks = harness(lm_eval, lm_eval_limit, lm_eval_tasks)
    asked = EvaluateOptions(
        generated=generated,
        batch=batch,
        together=together,
        sequential=sequential,
        routed=routed,
        false_fires=false_fires,
        subjects=subjects,
        ask_after=ask_after or RETENTION,
        damage=damage,
        guard=guard,
        text=text,
        harness=tasks,
        command=command,
    )
    split = "test" if data == "atlas" else None
    records = read(data, split=split, limit=limit, skip_bad=skip_bad, need_paraphrase=False)
    records = separated_by(records, separator)
    method = MethodOptions(settings, sites, last)
    lm, maker = load_editor(editor, model, dtype, team.device(device), method, chat)
    if team.main:
        claim(out, EVALUATION, model=lm.name, overwrite=True)
        claim(report, REPORT, model=lm.name)
    chosen = with_consequences(records) if data == "atlas" else readable(lm, records, skip_bad=skip_bad)
    unused = {"fields": dict(records.unused), "records": dict(records.reasons)}
    job = Job(lm, maker, chosen, asked, {name: counts for name, counts in unused.items() if counts})
    with team:
        found = job.run(out, team, overwrite=overwrite)
    if not team.main:
        return
    if report is not None:
        write_page(report, found, {"command": command, "asked": {"data": data, "editor": editor}})
        note(f"Wrote {report}.")
    if as_json:
        emit(found.as_dict())
    else:
        evaluation(found.as_dict())


def _command(**options: Any) -> str:
    """The command that measures the same."""
    parts = ["emendo evaluate"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            parts += [f"{flag} {shlex.quote(str(one))}" for one in values]
    return " ".join(parts)
