"""`emendo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emendo._outputs import ADAPTER, CHECKPOINT
from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output, warn_of_conflicts

HELP = """Export an edit for other software: as a PEFT LoRA adapter, or as a whole checkpoint with the edit merged in.

Without EDIT, all active edits of the model's ledger are exported together.

An adapter is exact unless --max-rank cuts its rank (servers limit it: vLLM to 16 by default); the error is printed.
Where PEFT is installed the adapter is loaded back, and nothing is written unless it matches the edit. A merge loses
what the number format of the weights cannot hold; the loss is printed.

\b
Examples:
  emendo export runs/demo/edit --to peft --out adapter
  emendo export runs/demo/edit --to merged --dtype bfloat16 --out checkpoint
  emendo export --model ./my-model --max-rank 64 --out adapter
"""

EditFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="EDIT",
        help="An edit: the --out folder of emendo edit.  [default: the active edits of the ledger]",
    ),
]
To = Annotated[str, typer.Option("--to", metavar="FORM", help="peft or merged.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write it.")]
MaxRank = Annotated[
    int | None,
    typer.Option("--max-rank", metavar="N", help="Cut the adapter to this rank.  [default: the edit's own]"),
]


def run(
    edit: EditFolder = None,
    *,
    out: Out,
    to: To = "peft",
    max_rank: MaxRank = None,
    model: opt.SameModel = None,
    ledger: keep.Where = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Export an edit."""
    from emendo.cli._loading import load_model
    from emendo.cli._paths import claim
    from emendo.edits import Edit, to_merged, to_peft
    from emendo.errors import RequestError

    if to not in ("peft", "merged"):
        raise RequestError(f"--to {to!r} is not one of peft, merged.")
    if to == "merged" and max_rank is not None:
        raise RequestError("--max-rank belongs to --to peft: a merged checkpoint has no rank.")
    if edit is not None and ledger is not None:
        raise RequestError("Give an EDIT or --ledger, not both.")
    kind = CHECKPOINT if to == "merged" else ADAPTER
    claim(out, kind, model=model, ledger=ledger, inputs=[edit], overwrite=overwrite)
    if edit is not None:
        change = Edit.from_pretrained(edit)
        lm = load_model(model or change.origin.model, dtype, device)
    else:
        keep.find_ledger(model or opt.MODEL, ledger)  # fails before the model is loaded
        lm = load_model(model or opt.MODEL, dtype, device)
        work = keep.open_workspace(lm, ledger)
        active, remembered = work.composed(), len(work.ledger.scopes())
        if remembered:
            what = "1 edit is" if remembered == 1 else f"{remembered} edits are"
            about = f"{what} in the memory, where each prompt chooses its edit; no checkpoint can do that"
            if active is None:
                raise RequestError(f"{about}. Export each by itself, or make one edit of them: emendo fuse.")
            note(f"{about}: only the edits in the weights are exported.")
        if active is None:
            raise RequestError(f"No edit of {lm.name} is active, so there is nothing to export.")
        change = active.compact()  # without loss: shared directions are stored once
    warn_of_conflicts([change])
    claim(out, kind, model=lm.name, overwrite=overwrite)
    if to == "merged":
        merged = to_merged(change, lm, out, overwrite=overwrite)
        _show({"out": str(out), "form": to, "dtype": dtype, "merge_loss": merged.loss}, as_json)
        return
    adapter = to_peft(change, lm, out, max_rank=max_rank, overwrite=overwrite)
    figures: dict[str, Any] = {"out": str(out), "form": to, "rank": adapter.rank, "error": adapter.error}
    if adapter.logits_differ_by is None:
        note("The adapter was not proven, since PEFT is not installed: pip install peft")
    else:
        figures["logits_differ_by"] = adapter.logits_differ_by
    _show(figures, as_json)


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(figures)
        return
    console = output()
    if figures["form"] == "merged":
        console.print(
            f"Merged into {figures['out']}. Rounding to {figures['dtype']} lost {figures['merge_loss']:.2%} of it.",
            soft_wrap=True,
        )
        return
    cut = f", relative error {figures['error']:.2e}" if figures["error"] else ", nothing cut"
    proof = (
        f" Loaded back with PEFT its logits differ by at most {figures['logits_differ_by']:.2e}."
        if "logits_differ_by" in figures
        else ""
    )
    console.print(
        f"Wrote a PEFT adapter of rank {figures['rank']}{cut} to {figures['out']}.{proof}", soft_wrap=True
    )
