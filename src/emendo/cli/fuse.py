"""`emendo fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo._outputs import EDIT
from emendo.cli import _options as opt
from emendo.cli._console import emit, output, warn_of_conflicts

if TYPE_CHECKING:
    from emendo.edits import Edit
    from emendo.models.loading import LM

HELP = """Solve for one edit that has the effect of many.

Edits that are applied together add up, and so does what they have in common: a handful may ruin a model that each of
them leaves intact. Fused edits are solved for together instead, so that every fact keeps its answer and running text
does not change. This takes seconds and needs no training, and the order does not matter: to remove an edit, fuse the
others. The result is an edit like any other. With --data the edits are made from a file of facts first, each from the
clean model, and they keep their effect at the file's paraphrases too.

\b
Examples:
  emendo fuse lyon canberra my-third-edit --out all-three
  emendo fuse edits/* --out all --keep 100
  emendo fuse --editor runs/mine --data facts.jsonl --out all
"""

Edits = Annotated[
    list[Path] | None, typer.Argument(metavar="EDIT...", help="Edits: the --out folders of emendo edit.")
]
Maker = Annotated[
    str | None,
    typer.Option(
        "--editor", metavar="EDITOR", help="The editor that edits the facts of --data, as in emendo edit."
    ),
]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Facts to edit: records, or atlas.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N of them.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to save the fused edit.")]
Keep = Annotated[
    float,
    typer.Option(
        "--keep",
        metavar="X",
        help="Weight of running text: more preserves the rest better and the facts less well.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Plain text that must not change, a paragraph a line.  [default: text that the model generates, and "
        "built-in facts]",
    ),
]


def run(
    edits: Edits = None,
    *,
    out: Out,
    editor: Maker = None,
    data: Data = None,
    limit: Limit = None,
    keep: Keep = 30.0,
    text: Text = None,
    model: opt.SameModel = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Fuse edits."""
    from emendo._storage import cache_folder
    from emendo.cli._loading import passages
    from emendo.cli._paths import claim
    from emendo.edits import compose, fuse
    from emendo.ledger.guard import targets_reached

    read = [*(edits or []), data, text]
    claim(out, EDIT, model=model, editor=editor, inputs=read, overwrite=overwrite)
    running = passages(text)
    lm, parts, paraphrases = _parts(edits or [], editor, data, limit, model, dtype, device)
    claim(out, EDIT, model=lm.name, overwrite=overwrite)
    if data is None:  # else the warning names the lines
        warn_of_conflicts(parts)
    fused = fuse(
        lm, parts, paraphrases=paraphrases, keep=keep, passages=running, folder=cache_folder() / "written"
    )
    fused.save_pretrained(out, overwrite=overwrite)
    found = []
    for edit in (fused, compose(parts)):
        with edit.applied(lm):  # each fact is asked as its own edit was made
            asked = [(lm.reading(chat=part.origin.chat), part.origin.requests) for part in parts]
            found.append(sum(sum(targets_reached(r, [one.pair for one in own])) for r, own in asked))
    facts = len(fused.origin.requests)
    if as_json:
        emit(
            {
                "out": str(out),
                "rank": fused.rank,
                "facts": facts,
                "reached": found[0],
                "added_up": found[1],
            }
        )
        return
    output().print(
        f"Fused {len(parts)} edits into one of rank {fused.rank}, saved in {out}. {found[0]} of {facts} facts "
        f"have their new answer, against {found[1]} where the edits are added up.",
        soft_wrap=True,
    )


def _parts(
    folders: list[Path],
    editor: str | None,
    data: str | None,
    limit: int | None,
    model: str | None,
    dtype: str,
    device: str | None,
) -> tuple[LM, list[Edit], list[tuple[str, ...]]]:
    """The model, the edits, and the paraphrases of each where a file has them."""
    from emendo.cli._loading import load_editor, load_model, read, readable
    from emendo.edits import Edit, Request
    from emendo.edits.edit import as_weights
    from emendo.errors import RequestError

    if data is None:
        if not folders or editor is not None or limit is not None:
            raise RequestError("Give edits, or facts with --data and an editor for them with --editor.")
        parts = [Edit.from_pretrained(folder) for folder in folders]
        return load_model(model or parts[0].origin.model, dtype, device), parts, []
    if folders or editor is None:
        raise RequestError("--data needs an --editor that makes the edits, and takes no EDIT beside it.")
    records = read(data, split="test" if data == "atlas" else None, limit=limit, need_paraphrase=False)
    lm, maker = load_editor(editor, model, dtype, device)
    facts = readable(lm, records)
    made = [maker.edit(lm, [Request(fact.prompt, fact.target, fact.separator)]) for fact in facts]
    parts = [as_weights(edit, "Only changes of weights can be fused") for edit in made]
    return lm, parts, [fact.paraphrases for fact in facts]
