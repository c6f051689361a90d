"""`emendo import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emendo._outputs import EDIT
from emendo.cli import _options as opt
from emendo.cli._console import emit, output

HELP = """Import a PEFT LoRA adapter as an edit, to inspect, compare and combine it like any other.

\b
Example:
  emendo import adapter --model smollm2-135m --out my-edit
"""

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to save the edit.")]


def run(
    adapter: Adapter,
    out: Out,
    model: opt.Model = opt.MODEL,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Import an adapter."""
    from emendo.cli._loading import load_model
    from emendo.cli._paths import claim
    from emendo.edits import from_peft

    claim(out, EDIT, model=model, inputs=[adapter], overwrite=overwrite)
    edit = from_peft(adapter, load_model(model, dtype, device))
    edit.save_pretrained(out, overwrite=overwrite)
    if as_json:
        emit({"out": str(out), "rank": edit.rank, "matrices": list(edit.deltas)})
        return
    output().print(
        f"Imported an edit of rank {edit.rank} at {len(edit.deltas)} matrices of {model}, saved in {out}.",
        soft_wrap=True,
    )
