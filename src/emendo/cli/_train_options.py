"""The options of `emendo train` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _number(flag: str, text: str, default: float | None = None, metavar: str = "N") -> Any:
    shown = "" if default is None else f"  [default: {default:g}]"
    return typer.Option(flag, metavar=metavar, help=text + shown, rich_help_panel="Training")


# Defaults stand here for the reader only: options that are not given take those of TrainConfig.
Steps = Annotated[int | None, _number("--steps", "Optimiser steps.", 2500)]
Batch = Annotated[int | None, _number("--batch", "Facts per step.", 8)]
Together = Annotated[int | None, _number("--together", "How many facts make one edit.", 1)]
Lr = Annotated[float | None, _number("--lr", "Learning rate at its peak.", 0.001, metavar="X")]
Warmup = Annotated[int | None, _number("--warmup", "Steps over which the learning rate rises.", 100)]
Minutes = Annotated[
    float | None,
    _number(
        "--minutes", "Stop after so many minutes, whatever --steps says.  [default: no limit]", metavar="X"
    ),
]
CEdit = Annotated[
    float | None, _number("--c-edit", "Weight of the edit loss against the locality loss.", 0.3, metavar="X")
]
PromptShare = Annotated[
    float | None,
    _number(
        "--prompt-share",
        "Share of the edit loss that the edit prompt has; its rewording has the rest.",
        0.5,
        metavar="X",
    ),
]
Variety = Annotated[
    int | None,
    _number("--variety", "Use at most N rewordings, neighbours and unrelated probes of a record.", 3),
]
Near = Annotated[
    int | None, _number("--near", "Neighbours of the record per edit that must keep their answers.", 1)
]
Sibling = Annotated[
    int | None, _number("--sibling", "Other facts of the same relation per edit that must stay.", 1)
]
Unrelated = Annotated[int | None, _number("--unrelated", "Unrelated facts per edit that must stay.", 0)]
TextExamples = Annotated[
    int | None,
    _number(
        "--text-examples", "Passages of running text per edit that must stay; only decoders have them.", 1
    ),
]
Clip = Annotated[float | None, _number("--clip", "Largest norm of the gradient.", 1.0, metavar="X")]
Seed = Annotated[
    int | None, _number("--seed", "Seed of the editor's start and of the order of the facts.", 0)
]
ValidateEvery = Annotated[
    int | None, _number("--validate-every", "Steps between validations; the best editor is kept.", 250)
]
ValidateOn = Annotated[int | None, _number("--validate-on", "Facts to validate on, at most.", 100)]
Patience = Annotated[
    int | None, _number("--patience", "Stop after so many validations without a better score.", 10)
]
CheckpointEvery = Annotated[
    float | None, _number("--checkpoint-every", "Seconds between checkpoints.", 60.0, metavar="X")
]

Data = Annotated[str, typer.Option("--data", metavar="FILE", help="Records to learn from: a file, or atlas.")]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation",
        metavar="FILE",
        help="Records to choose the best editor by.  [default: the last 2% of --data, not learnt from; for atlas its "
        "validation split]",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Plain text, a paragraph a line, on which the model must stay as it is.  [default: what a decoder writes "
        "by itself]",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Use the first N records only.")]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave malformed records out and say how many, instead of stopping."),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the run and its editor are kept.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the stopped run in --out; needs no other option.")
]
