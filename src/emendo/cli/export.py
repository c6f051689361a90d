"""`emendo export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emendo._outputs import ADAPTER, ADAPTERS, CHECKPOINT, GGUF
from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import emit, note, output, warn_of_conflicts

if TYPE_CHECKING:
    from emendo.ledger.workspace import Workspace

HELP = """Export an edit for other software: as a LoRA adapter of PEFT or llama.cpp, or merged into a whole checkpoint.

Without EDIT, the active edits of the model's ledger that are in the weights are exported together. With --to adapters
each edit of its memory becomes an adapter in a folder of its own, with an index.json that names its prompts, for a
server that takes an adapter for each request. With --to gguf-adapters each is a file for llama.cpp, which loads them at
its start; it is named by its content, as emendo serve --upstream asks for it.

With --to gguf the adapter is a file for llama.cpp (--lora FILE). A merged GGUF is made by llama.cpp's own converter,
convert_hf_to_gguf.py, which must be on the PATH.

An adapter is exact unless --max-rank cuts its rank (servers limit it: vLLM to 16 by default); the error is printed.
Where PEFT is installed the adapter is loaded back, and nothing is written unless it matches the edit. A merge loses
what the number format of the weights cannot hold; the loss is printed.

\b
Examples:
  emendo export runs/demo/edit --to peft --out adapter
  emendo export runs/demo/edit --to merged --dtype bfloat16 --out checkpoint
  emendo export --model ./my-model --max-rank 64 --out adapter
  emendo export --model ./my-model --to adapters --max-rank 16 --out adapters
  emendo export runs/demo/edit --to gguf --out edit.gguf
"""

_KINDS = {
    "peft": ADAPTER,
    "merged": CHECKPOINT,
    "adapters": ADAPTERS,
    "gguf": GGUF,
    "gguf-adapters": ADAPTERS,
    "merged-gguf": GGUF,
}
"""The forms, and the kinds of output that they make."""

EditFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="EDIT",
        help="An edit: the --out folder of emendo edit.  [default: the active edits of the ledger]",
    ),
]
To = Annotated[
    str,
    typer.Option(
        "--to", metavar="FORM", help="One of peft, merged, adapters, gguf, gguf-adapters, merged-gguf."
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="PATH", help="The folder (of a GGUF, the file) to write.")
]
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
    from emendo.edits import Edit, to_gguf, to_merged, to_merged_gguf, to_peft
    from emendo.errors import RequestError

    if to not in _KINDS:
        raise RequestError(f"--to {to!r} is not one of {', '.join(_KINDS)}.")
    of_memory = _KINDS[to] is ADAPTERS
    if of_memory and edit is not None:
        raise RequestError(f"--to {to} exports the edits of a ledger's memory; leave EDIT out.")
    if to.startswith("merged") and max_rank is not None:
        raise RequestError("--max-rank belongs to adapters: a merged checkpoint has no rank.")
    if edit is not None and ledger is not None:
        raise RequestError("Give an EDIT or --ledger, not both.")
    kind = _KINDS[to]
    claim(out, kind, model=model, ledger=ledger, inputs=[edit], overwrite=overwrite)
    if edit is not None:
        change = Edit.from_pretrained(edit)
        lm = load_model(model or change.origin.model, dtype, device)
    else:
        keep.find_ledger(model or opt.MODEL, ledger)  # fails before the model is loaded
        lm = load_model(model or opt.MODEL, dtype, device)
        work = keep.open_workspace(lm, ledger)
        if of_memory:
            claim(out, kind, model=lm.name, overwrite=overwrite)
            _show(_adapters(work, out, to, max_rank, overwrite=overwrite), as_json)
            return
        active, remembered = work.composed(), len(work.ledger.scopes())
        if remembered:
            what = "1 edit is" if remembered == 1 else f"{remembered} edits are"
            about = f"{what} in the memory, where each prompt chooses its edit; no checkpoint can do that"
            if active is None:
                raise RequestError(f"{about}. Export them with --to adapters, or as one edit: emendo fuse.")
            note(f"{about}: only the edits in the weights are exported.")
        if active is None:
            raise RequestError(f"No edit of {lm.name} is active, so there is nothing to export.")
        change = active.compact()  # without loss: shared directions are stored once
    warn_of_conflicts([change])
    claim(out, kind, model=lm.name, overwrite=overwrite)
    if to.startswith("merged"):
        merged = (
            to_merged(change, lm, out, overwrite=overwrite)
            if to == "merged"
            else to_merged_gguf(change, lm, out)
        )
        _show({"out": str(out), "form": to, "dtype": dtype, "merge_loss": merged.loss}, as_json)
        return
    adapter = (
        to_gguf(change, lm, out, max_rank=max_rank)
        if to == "gguf"
        else to_peft(change, lm, out, max_rank=max_rank, overwrite=overwrite)
    )
    figures: dict[str, Any] = {"out": str(out), "form": to, "rank": adapter.rank, "error": adapter.error}
    if adapter.logits_differ_by is not None:
        figures["logits_differ_by"] = adapter.logits_differ_by
    elif to == "peft":
        note("The adapter was not proven, since PEFT is not installed: pip install peft")
    _show(figures, as_json)


def _adapters(
    work: Workspace, out: Path, to: str, max_rank: int | None, *, overwrite: bool
) -> dict[str, Any]:
    """Write an adapter for each edit of the memory, and the index of them; returns the figures.

    Raises:
        RequestError: the memory is empty.
    """
    from emendo._adapter_names import adapter_name
    from emendo._storage import new_folder, write_json
    from emendo.edits import to_gguf, to_peft
    from emendo.errors import RequestError

    scopes, listed = work.ledger.scopes(), []
    if not scopes:
        raise RequestError(f"The memory of {work.lm.name} has no edit, so there is nothing to export.")
    place, write = ("file", to_gguf) if to == "gguf-adapters" else ("folder", to_peft)
    with new_folder(out, ADAPTERS, overwrite=overwrite) as new:
        for entry in work.ledger.entries(scopes):
            name = (
                f"edit-{entry.id}" if place == "folder" else f"{adapter_name([entry.digest], max_rank)}.gguf"
            )
            adapter = write(work.edit(entry.id), work.lm, new / name, max_rank=max_rank)
            listed.append(
                {
                    "edit": entry.id,
                    place: name,
                    "digest": entry.digest,
                    "requests": list(entry.requests),
                    "scope": scopes[entry.id],
                    "rank": adapter.rank,
                    "error": adapter.error,
                }
            )
        index = {
            "format": 1,
            "model": work.ledger.model,
            "fingerprint": work.ledger.fingerprint,
            "adapters": listed,
        }
        write_json(new / "index.json", index)
    return {"out": str(out), "form": to, "adapters": len(listed)}


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(figures)
        return
    console = output()
    if "adapters" in figures:
        console.print(
            f"Wrote {figures['adapters']} adapters and index.json to {figures['out']}.", soft_wrap=True
        )
        return
    if "merge_loss" in figures:
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
    kind = "GGUF" if figures["form"] == "gguf" else "PEFT"
    console.print(
        f"Wrote a {kind} adapter of rank {figures['rank']}{cut} to {figures['out']}.{proof}", soft_wrap=True
    )
