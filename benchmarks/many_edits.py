"""Many facts in one checkpoint: every method, in one call and in sequence, all facts asked at the end.

A cell is a method, a number of facts, and how many of them one edit has: all of them (one call), or a batch, each edit
made in the model with all earlier ones. Success, generalisation and locality are means over the records, generated and
teacher forced; the perplexity is that of plain passages. A method is an editor's name, a trained editor's folder or
name, or ``fused:EDITOR`` for its single edits fused.

Every cell is kept in a file of ``--out`` and not measured again, so that a run can be stopped and gone on with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from _common import facts, load, machine, parser, table

from emendo import fuse
from emendo._settings import parse_settings
from emendo._storage import cache_folder
from emendo.data.abilities import PASSAGES
from emendo.data.schema import Record
from emendo.editors import EDITORS, Editor, editor_class
from emendo.edits.edit import Request
from emendo.evaluate import evaluate_sequence
from emendo.evaluate.damage import Damage
from emendo.evaluate.results import Result
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites


class Fused(Editor):
    """The single edits of another editor, fused."""

    name = "fused"
    needs_training = False

    def __init__(self, editor: Editor) -> None:
        super().__init__(editor.sites, editor.config)
        self.editor = editor

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The single edits."""
        return self.editor.each(lm, requests)

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The fused edit."""
        edits = [self.editor.edit(lm, request.prompt, request.target) for request in requests]
        return dict(fuse(lm, edits, folder=cache_folder() / "written").deltas)


def editor_of(lm: LM, method: str, settings: Sequence[str], sites: Sequence[str]) -> Editor:
    """The editor of a method; settings and sites are for methods that need no training."""
    if method.startswith("fused:"):
        return Fused(editor_of(lm, method.removeprefix("fused:"), settings, sites))
    if method not in EDITORS:
        return Editor.from_pretrained(method)
    kind = editor_class(method)
    chosen = find_sites(lm.model, list(sites)) if sites else kind.default_sites(lm.model)
    return kind(chosen, parse_settings(kind.Config, settings, "--set", f"{method} has no setting"))


def measured(lm: LM, editor: Editor, records: Sequence[Record], together: int) -> dict[str, Any]:
    """The figures of a cell."""
    began = time.process_time()
    found = evaluate_sequence(lm, editor, records, at=(), together=together, damage=Damage(PASSAGES))
    last = found.checkpoints[-1].results
    return {
        "generated": [share(last, kind, "generated") for kind in KINDS],
        "teacher forced": [share(last, kind, "teacher_forced") for kind in KINDS],
        "perplexity": last[-1].damage["perplexity"],
        "clean perplexity": found.clean["perplexity"],
        "norm": last[-1].norm,
        "seconds": sum(result.seconds for result in found.right_after),
        "processor seconds with scoring": time.process_time() - began,
    }


KINDS = ("edit", "paraphrase", "neighbour")


def share(results: Sequence[Result], kind: str, score: str) -> float | None:
    """The mean over records of the share of their prompts of a kind that hold; None where there are none."""
    own = [[getattr(o, score) for o in result.outcomes if o.kind == kind] for result in results]
    return fmean(fmean(one) for one in own if one) if any(own) else None


def figure(value: float | None) -> str:
    """A share with three digits."""
    return "-" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--methods", nargs="+", default=["locft", "crisp", "memit", "alphaedit", "ultraedit"])
    made.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100])
    made.add_argument("--batches", type=int, nargs="+", default=[0], help="facts of an edit; 0: all of them")
    made.add_argument("--set", dest="settings", nargs="+", default=[], help="settings of the methods")
    made.add_argument("--sites", nargs="+", default=[], help="matrices, by patterns over their names")
    made.add_argument("--out", type=Path, default=Path("runs/many-edits"), help="where the cells are kept")
    options = made.parse_args(arguments)
    machine(options)
    lm = load(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in options.methods:
        for count in options.counts:
            for batch in options.batches:
                together = min(batch or count, count)
                chosen = [method, lm.name, options.data, *options.settings, *options.sites]
                name = "_".join(Path(part).name for part in chosen).replace(":", "-").replace("*", "")
                file = options.out / f"{name}_{count}_{together}.json"
                if not file.exists():
                    editor = editor_of(lm, method, options.settings, options.sites)
                    cell = measured(lm, editor, facts(options, count), together)
                    file.write_text(
                        json.dumps({"method": method, "facts": count, "together": together, **cell})
                    )
                cell = json.loads(file.read_text())
                how = "one call" if together == count else f"in sequence, {together} at a time"
                shown = [
                    " / ".join("-" if x is None else f"{x:.3f}" for x in cell[k])
                    for k in ("generated", "teacher forced")
                ]
                rows.append((method, count, how, *shown, cell["perplexity"], cell["seconds"]))
    head = ("method", "facts", "how", "generated", "teacher forced", "perplexity", "seconds")
    table("Success / generalisation / locality of many facts in one checkpoint", head, rows)


if __name__ == "__main__":
    main()
