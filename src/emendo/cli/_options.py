"""Options that commands share, each with its help in one place."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL = "smollm2-135m"
"""The built-in model: it comes with a Python package, so no hub is needed."""

_MODEL_HELP = (
    f"The language model: {MODEL} (built in), a folder in the Hugging Face layout, or an id on the hub."
)

Model = Annotated[str, typer.Option("--model", metavar="NAME", help=_MODEL_HELP)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
SameModel = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help=f"{_MODEL_HELP}  [default: the model of the edit]"),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Number format of the model: float32, bfloat16, float16, or fastest, which is bfloat16 where the device "
        "multiplies that at least twice as fast as float32.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the model runs: cpu, cuda, cuda:1; or auto, which fills GPUs, then memory, then reads the rest "
        "from disk.  [default: cpu]",
    ),
]
_CHAT = (
    "Put every prompt into the chat template of the model's tokenizer, as instruction-tuned models expect it"
)
_CHAT_OR_NOT = f"{_CHAT}, or leave it as it is."
Chat = Annotated[bool, typer.Option("--chat", help=f"{_CHAT}.")]
SameChat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help=f"{_CHAT_OR_NOT}  [default: as the edit was made]"),
]
AnyChat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help=f"{_CHAT_OR_NOT}  [default: as the editor was trained]"),
]
Separator = Annotated[
    str | None,
    typer.Option(
        "--separator",
        metavar="TEXT",
        help="The text between a prompt and its answer; \\n is a line break.  [default: a space where the script "
        "needs one]",
    ),
]
TRAINED = ("mend", "enn", "ke", "malmen", "meta-curvature", "meta-sgd", "meta-lstm")
"""Methods that must be trained; written out, so that help pages import nothing."""
UNTRAINED = (
    *("ft", "ft-kl", "ft-constrained", "ft-penalised", "diff-pruning", "ewc"),
    *("lora", "locft", "crisp", "rome", "joint-rome", "memit", "alphaedit", "ultraedit"),
    *("repair", "k-adapter", "cache", "in-context"),
)
"""Methods that need no training."""

_EDITOR_HELP = (
    "A trained editor: the --out folder of emendo train, or its editor/; a name from emendo editors; or an id on the "
    f"hub. Or a method that needs no training: {', '.join(UNTRAINED)}."
)
AnyEditor = Annotated[str, typer.Option("--editor", metavar="EDITOR", help=_EDITOR_HELP)]
BestEditor = Annotated[
    str | None,
    typer.Option(
        "--editor",
        metavar="EDITOR",
        help=f"{_EDITOR_HELP}  [default: the editor that ships for the model, else the best of these methods]",
    ),
]
AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help=f"{_MODEL_HELP}  [default: the model of the editor, else {MODEL}]",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for machines instead of text for people.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what --out already holds, if emendo wrote it.")
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="WHICH",
        help="Which weight matrices to edit: mlp, attention, all, or a pattern over their names such as "
        "'*.down_proj' (may be repeated).  [default: mlp]",
        rich_help_panel="Editor",
    ),
]
Last = Annotated[
    int | None,
    typer.Option(
        "--last",
        metavar="N",
        help="Edit the last N blocks.  [default: 3; with a pattern, all blocks]",
        rich_help_panel="Editor",
    ),
]
_METHOD = "Method without training"
MethodSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method, such as radius=2.5 (may be repeated); an unknown key lists them all.",
        rich_help_panel=_METHOD,
    ),
]
MethodSites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="WHICH",
        help="Which weight matrices to edit, as for emendo train.  [default: mlp]",
        rich_help_panel=_METHOD,
    ),
]
MethodLast = Annotated[
    int | None,
    typer.Option(
        "--last",
        metavar="N",
        help="Edit the last N blocks.  [default: 3, or 2 each of encoder and decoder; with a pattern, all blocks]",
        rich_help_panel=_METHOD,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="R",
        help="Rank of the editor's layers: more learns more and takes more memory. Short for --set rank=R.  "
        "[default: 256]",
        rich_help_panel="Editor",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the editor, such as norm=false or factors=u (may be repeated); an unknown key lists "
        "them all.",
        rich_help_panel="Editor",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--editor",
        metavar="METHOD",
        help=f"The editing method: {', '.join(TRAINED)}.",
        rich_help_panel="Editor",
    ),
]
