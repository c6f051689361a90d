"""The exactness of an edit that is attached and detached, merged, and exported to PEFT; its size and speed.

``--edit FOLDER`` measures your own edit (``emendo edit --out FOLDER``); by default LoRA and fine-tuning make one each.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Spread, facts, interleaved, machine, parser, table
from torch import Tensor

from emendo.editors.ft import FineTuning
from emendo.editors.lora import Lora
from emendo.edits import Edit, prove, to_peft
from emendo.models import loading as models
from emendo.models.lm import LM
from emendo.models.sites import find_sites

TIMES = 1000
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=9)
    made.add_argument("--edit", default=None, help="an edit's folder")
    options = made.parse_args(arguments)
    machine(options)
    torch.set_num_threads(options.threads)
    record = facts(options, 1)[0]
    rows, sizes = [], []
    for dtype in DTYPES:
        lm = models.load(options.model, dtype=dtype)
        for name, edit in _edits(lm, options.edit, record):
            rows.append((f"{name}, {dtype}", *_errors(lm, edit)))
            if dtype == DTYPES[0]:
                sizes.append((name, *_size(lm, edit, options)))
    table(
        f"Exactness ({TIMES:,} times attached and detached)",
        (
            "edit, model",
            "bits changed",
            "||dW||/||W||",
            "merge loss",
            "restored",
            "PEFT: logits differ by",
            "merged: differ by",
        ),
        rows,
    )
    table(
        "Size and time",
        ("edit", "rank", "on disk, KB", "compacted to 1%: rank", "on disk, KB", "attached and detached, ms"),
        sizes,
    )


def _edits(lm: LM, folder: str | None, record: Any) -> list[tuple[str, Edit]]:
    if folder is not None:
        edit = Edit.from_pretrained(folder)
        return [(edit.origin.editor, edit)] if edit.origin.fingerprint == lm.fingerprint else []
    found = []
    for editor in (Lora(find_sites(lm.model)), FineTuning(find_sites(lm.model))):
        edit = editor.edit(lm, record.prompt, record.target)
        assert isinstance(edit, Edit)
        found.append((editor.name, edit))
    return found


def _logits(lm: LM, edit: Edit) -> Tensor:
    return lm.next_logits([request.prompt for request in edit.origin.requests]).float()


def _errors(lm: LM, edit: Edit) -> tuple[str, float, float, str, float, float]:
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    before = _logits(lm, edit)
    for _ in range(TIMES):
        edit.attach(lm).detach()
    changed = _changed(lm, weights) + int((_logits(lm, edit) != before).sum())
    with edit.applied(lm):
        beside = _logits(lm, edit)
    merged = edit.merge_(lm)
    inside = _logits(lm, edit)
    merged.restore()
    restored = "bit for bit" if _changed(lm, weights) == 0 else f"{_changed(lm, weights)} entries differ"
    norms = edit.relative_norms(lm).values()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_peft(edit, lm, Path(folder) / "adapter")
        proof = prove(edit, lm, Path(folder) / "adapter")
    return (
        str(changed),
        sum(norms) / len(norms),
        merged.loss,
        restored,
        proof,
        float((inside - beside).abs().max()),
    )


def _changed(lm: LM, weights: dict[str, Tensor]) -> int:
    return sum(int((value != weights[name]).sum()) for name, value in lm.model.state_dict().items())


def _size(lm: LM, edit: Edit, options: Any) -> tuple[Any, ...]:
    small = edit.compact(tolerance=0.01)
    times = interleaved({"both": lambda: edit.attach(lm).detach()}, options)["both"]
    on = Spread.of(times).scaled(1e3)
    return edit.rank, len(edit.to_bytes()) / 1024, small.rank, len(small.to_bytes()) / 1024, on


if __name__ == "__main__":
    main()
