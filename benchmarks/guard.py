"""What good edits and bad ones do to everything else: where the guard's limits come from.

::

    python benchmarks/guard.py FACTS.json [--editor FOLDER] [--facts 30] [--sequence 40]

Single edits of SmolLM2-135M, each from the clean model, by several methods, some of them bad on purpose; then edits
one upon the other. Prints the quantiles of each of the guard's figures, and how many it refuses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import torch
from rich.console import Console
from rich.table import Table

from emendo import Edit, Editor, Record, load, read_records
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.editors.lora import Lora
from emendo.ledger import Ledger
from emendo.ledger.guard import Health, Limits
from emendo.ledger.workspace import Workspace
from emendo.lowrank import LowRank
from emendo.models import LM
from emendo.sites import find_sites

QUANTILES = (0.1, 0.5, 0.9)
Make = Callable[[Record], Edit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts_file", help="records in any layout that emendo reads")
    parser.add_argument("--editor", help="a trained editor's folder")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--sequence", type=int, default=40)
    asked = parser.parse_args()
    lm = load(asked.model)
    records = list(read_records(asked.facts_file, need_paraphrase=False))
    makers = dict(methods(lm, asked.editor))
    console = Console(width=130)
    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(lm, Ledger.create(folder, lm.fingerprint, asked.model), recheck_every=0)
        table = figures_table(f"{asked.facts} single edits, each from the clean model: 10% / median / 90%")
        for name, make in makers.items():
            found = [work.check(make(record), record.paraphrases[:1]) for record in records[: asked.facts]]
            add_row(table, name, found, work.limits)
        console.print(table)
        sequence(console, work, makers, records[: asked.sequence])


def methods(lm: LM, editor: str | None) -> Iterator[tuple[str, Make]]:
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
    def make(record: Record) -> Edit:
        edit = editor.edit(lm, record.prompt, record.target)
        assert isinstance(edit, Edit)
        return edit

    return make


def noise(lm: LM, size: float) -> Make:
    """Random changes of rank 16, of a share of each matrix's size."""
    like = by(lm, FineTuning(find_sites(lm.model), FineTuningConfig(steps=1)))

    def make(record: Record) -> Edit:
        deltas = {}
        for site in find_sites(lm.model):
            delta = LowRank(torch.randn(site.d_out, 16), torch.randn(16, site.d_in))
            deltas[site.name] = delta.scale(size * float(site.weight(lm.model).norm()) / float(delta.norm()))
        return Edit(deltas, like(record).origin)

    return make


def sequence(console: Console, work: Workspace, makers: dict[str, Make], records: Sequence[Record]) -> None:
    """One edit upon the other, whatever the guard says; how far the first methods get within the limits."""
    for name, make in list(makers.items())[:3]:
        table = figures_table(f"{name}, one edit upon the other: after so many")
        del table.columns[-1]
        for count, record in enumerate(records, 1):
            done = work.apply(make(record), paraphrases=record.paraphrases[:1], force=True)
            if count in (1, 2, 5, 10, 20, 40, 80, 160) or count == len(records):
                assert done.health is not None
                values = [done.health[field.name] for field in fields(Health)]
                table.add_row(f"{count}", *[f"{value:.3g}" for value in values])
        console.print(table)
        found = work.examine()
        console.print(
            f"{name}: after {len(records)} edits {found.retention:.1%} of the targets are still the answer.\n"
        )
        work.undo(len(records))


def figures_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for field in fields(Health):
        table.add_column(field.name.replace("_", " "), justify="right")
    table.add_column("refused", justify="right")
    return table


def add_row(table: Table, name: str, found: Sequence[Health], limits: Limits) -> None:
    cells = []
    for field in fields(Health):
        values = torch.tensor([getattr(health, field.name) for health in found], dtype=torch.float64)
        cells.append(
            " / ".join(f"{value:.3g}" for value in values.quantile(torch.tensor(QUANTILES).double()).tolist())
        )
    refused = sum(bool(health.problems(limits)) for health in found)
    table.add_row(name, *cells, f"{refused} of {len(found)}")


if __name__ == "__main__":
    main()
