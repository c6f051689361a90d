"""The guard's figures for good and for bad edits: the measurement behind its limits.

First single edits of several methods, each from the base model, some of them bad on purpose: the 10% quantile, the
median and the 90% quantile of each figure, and the number of refused edits. Then edits applied one after the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import torch
from _common import facts, load, machine, number, parser
from torch import Tensor

from emendo import Edit, Editor, Record
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.editors.lora import Lora
from emendo.ledger import Ledger
from emendo.ledger.health import Health
from emendo.ledger.workspace import Workspace
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites

FIGURES = [field.name for field in fields(Health)]
QUANTILES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
Make = Callable[[Record], Edit]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--editor", help="a trained editor's folder")
    made.add_argument("--edits", type=int, default=30, help="number of single edits of each method")
    made.add_argument("--sequence", type=int, default=40, help="number of edits applied one after the other")
    options = made.parse_args(arguments)
    machine(options)
    lm = load(options)
    makers = dict(methods(lm, options.editor))
    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(lm, Ledger.create(folder, lm.fingerprint, options.model), recheck_every=0)
        singles(work, makers, facts(options, options.edits))
        sequences(work, dict(list(makers.items())[:3]), facts(options, options.sequence))


def methods(lm: LM, editor: str | None) -> Iterator[tuple[str, Make]]:
    """The methods, the good ones first."""
    sites = find_sites(lm.model)
    if editor is not None:
        trained = Editor.from_pretrained(editor)
        yield trained.name, by(lm, trained)
    yield "lora", by(lm, Lora(sites))
    yield "ft", by(lm, FineTuning(sites))
    for rate in (1e-4, 1e-3):
        yield f"ft, lr {rate:g} (bad)", by(lm, FineTuning(sites, FineTuningConfig(lr=rate, steps=10)))
    for size in (0.01, 0.05, 0.2):
        yield f"noise, {size:.0%} of W (bad)", noise(lm, size)


def by(lm: LM, editor: Editor) -> Make:
    """A function that makes an editor's edit of a record."""

    def make(record: Record) -> Edit:
        edit = editor.edit(lm, record.prompt, record.target)
        assert isinstance(edit, Edit)
        return edit

    return make


def noise(lm: LM, size: float) -> Make:
    """A function that makes random changes of rank 16, each with a given share of its matrix's norm."""
    like = by(lm, FineTuning(find_sites(lm.model), FineTuningConfig(steps=1)))

    def change(weight: Tensor) -> LowRank:
        delta = LowRank(torch.randn(weight.shape[0], 16), torch.randn(16, weight.shape[1]))
        return delta.scale(size * float(weight.norm()) / float(delta.norm()))

    return lambda record: Edit(
        {site.name: change(site.weight(lm.model)) for site in find_sites(lm.model)}, like(record).origin
    )


def singles(work: Workspace, makers: dict[str, Make], records: Sequence[Record]) -> None:
    """Print a row for each method."""
    head(f"{len(records)} single edits, each from the base model: 10% / median / 90%", "refused")
    for name, make in makers.items():
        found = [work.check(make(record), record.paraphrases[:1]) for record in records]
        cells = []
        for figure in FIGURES:
            values = [value for health in found if (value := getattr(health, figure)) is not None]
            marks = torch.tensor(values, dtype=torch.float64).quantile(QUANTILES).tolist()
            cells.append(" / ".join(map(number, marks)))
        refused = sum(bool(health.problems(work.limits)) for health in found)
        row(name, *cells, f"{refused} of {len(found)}")


def sequences(work: Workspace, makers: dict[str, Make], records: Sequence[Record]) -> None:
    """Apply edits one after the other, by force."""
    for name, make in makers.items():
        head(
            f"{name}, edits applied one after the other; the guard's figures by their number",
            "still the answer",
        )
        for count, record in enumerate(records, 1):
            done = work.apply(make(record), paraphrases=record.paraphrases[:1], force=True)
            if count in (1, 2, 5, 10, 20, 40, 80, 160) or count == len(records):
                assert done.health is not None
                values = (
                    "" if (value := done.health[figure]) is None else number(value) for figure in FIGURES
                )
                row(str(count), *values, f"{work.examine().retention:.0%}")
        work.undo(len(records))


def head(title: str, last: str) -> None:
    print(f"\n**{title}**\n")
    row("", *(figure.replace("_", " ") for figure in FIGURES), last)
    row(*(["---"] * (len(FIGURES) + 2)))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
