"""Appendix A of the MEND paper as tables and a figure: ``python -m reproduction.mend_paper.appendix_a``.

The appendix says that the inputs of MEND's networks differ in magnitude by several orders of magnitude, so that they
are normalised, by statistics of the edit train set, and that the networks start as the identity, since another start
gives up the prior that the gradient is a useful edit. Here the magnitudes are measured at every edited matrix, and the
loss is drawn as MEND is trained in each of these ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from emendo._storage import new_file
from emendo.cli._console import note
from emendo.cli._progress import show_progress
from emendo.cli._tables import print_table
from emendo.data.schema import Record
from emendo.editors._nets import LowRankBlock, RunningStats
from emendo.editors.gradient import edit_factors, in_batches
from emendo.editors.mend import Mend, MendConfig
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.progress import SILENT, Progress
from emendo.report.plots import BLUE, GREEN, INK, ORANGE, RED, SKY, legend, panels, render
from emendo.report.tables import Column, Table, to_markdown
from emendo.train import TrainConfig, train
from reproduction.mend_paper.program import program_of
from reproduction.mend_paper.sources import Bench, Stored

HELP = """Measure the claims of appendix A of the MEND paper: magnitudes, normalisation and starts.

Prints the magnitudes of u and delta at each edited matrix, trains MEND with and without normalisation and from three
starts, and writes appendix_a.svg and appendix_a.md.

\b
Examples:
  python -m reproduction.mend_paper.appendix_a --out runs/appendix-a
  python -m reproduction.mend_paper.appendix_a --task counterfact --data ./data --steps 300
"""

BASE = "identity start, train-set statistics"
VARIANTS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    BASE: ({"statistics": "train-set"}, False),
    "running statistics": ({"statistics": "running"}, False),
    "no normalisation": ({"norm": False}, False),
    "Xavier start": ({"statistics": "train-set", "identity": False}, False),
    "zero start": ({"statistics": "train-set"}, True),
}
"""The settings of each training, and whether ``V`` starts at zero as ``U`` does: then neither has a gradient."""
LEFT, RIGHT = tuple(VARIANTS)[:3], (BASE, *tuple(VARIANTS)[3:])
"""The variants of each panel of the figure: of the normalisation, and of the start."""
_LOOKS = dict(zip(VARIANTS, ((BLUE, "-"), (SKY, "--"), (RED, "-"), (ORANGE, "-"), (GREEN, ":")), strict=True))


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The magnitudes of one factor at one site, over the rows of all facts.

    Attributes:
        site: the matrix.
        factor: ``u`` or ``delta``.
        typical: the root of the mean square of all entries.
        smallest: the smallest standard deviation of a dimension.
        largest: the largest standard deviation of a dimension.
    """

    site: str
    factor: str
    typical: float
    smallest: float
    largest: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The losses of one training.

    Attributes:
        name: of the variant.
        steps: of the reports.
        losses: mean training loss of the (up to 50) steps before each report.
        last: figures of the last validation.
    """

    name: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    last: Mapping[str, float]


def magnitudes(lm: LM, sites: tuple[Site, ...], records: Sequence[Record]) -> list[Magnitude]:
    """The magnitudes of ``u`` and ``delta`` at each site; rows are all tokens of all facts that carry gradient."""
    texts = to_texts(lm, [(record.prompt, record.target) for record in records])
    trunk = Trunk(lm.model, sites)
    stats = {(site.name, "u"): RunningStats(site.d_in) for site in sites}
    stats |= {(site.name, "delta"): RunningStats(site.d_out) for site in sites}
    for part in in_batches(texts):
        for name, rows in edit_factors(trunk, sites, [texts[place] for place in part], packed=True).items():
            stats[name, "u"].update(rows.u)
            stats[name, "delta"].update(rows.delta)
    return [
        Magnitude(
            *place,
            typical=float((own.mean.square() + own.m2 / own.count).mean().sqrt()),
            smallest=float(own.std().min()),
            largest=float(own.std().max()),
        )
        for site in sites
        for place, own in ((place, stats[place]) for place in ((site.name, "u"), (site.name, "delta")))
    ]


def curves(
    bench: Bench, config: TrainConfig, settings: Mapping[str, Any], progress: Progress = SILENT
) -> list[Curve]:
    """Train MEND in each of the ways, from one seed.

    Args:
        bench: a task and its model.
        config: of every training.
        settings: MEND's settings that all trainings share.
        progress: receives the progress.
    """
    found, task = [], bench.task
    for name, (own, zero) in VARIANTS.items():
        torch.manual_seed(config.seed)
        editor = Mend(find_sites(bench.lm.model), MendConfig(**{**settings, **own}))
        for block in editor.modules() if zero else ():
            if isinstance(block, LowRankBlock):
                nn.init.zeros_(block.v)
        history = train(
            bench.lm,
            editor,
            task.train,
            task.validation,
            config,
            passages=task.passages,
            progress=progress,
        ).history
        rows = [row for row in history if "loss" in row]
        last = next((row for row in reversed(history) if "validation loss" in row), {})
        steps, losses = zip(*((int(row["step"]), row["loss"]) for row in rows), strict=True)
        found.append(Curve(name, steps, losses, last))
    return found


def magnitude_table(found: Sequence[Magnitude]) -> Table:
    """The magnitudes at each site, and their range over all sites and dimensions."""
    rows: list[list[str]] = [
        [f"`{m.site}`", m.factor, f"{m.typical:.2e}", f"{m.smallest:.2e}", f"{m.largest:.2e}"] for m in found
    ]
    typical = [m.typical for m in found]
    ranges = [f"{min(typical):.2e} to {max(typical):.2e}"]
    for factor in ("u", "delta"):
        own = [m.typical for m in found if m.factor == factor]
        ranges.append(f"{factor} {min(own):.2e} to {max(own):.2e}")
    heads = ("matrix", "factor", "root mean square", "smallest deviation", "largest deviation")
    note = f"Root mean square over all matrices: {ranges[0]} ({'; '.join(ranges[1:])}). "
    return Table([Column(name) for name in heads], rows, note=f"{note}A deviation is of one dimension.")


def curve_table(found: Sequence[Curve]) -> Table:
    """The first and last training loss of each training, and its last validation."""
    scores = ("success", "generalisation", "locality")
    rows = [
        [
            curve.name,
            f"{curve.losses[0]:.3f}",
            f"{curve.losses[-1]:.3f}",
            *(f"{curve.last[f'validation {name}']:.3f}" if curve.last else "-" for name in ("loss", *scores)),
        ]
        for curve in found
    ]
    heads = ("training", "first loss", "last loss", "validation loss", *scores)
    return Table([Column(name) for name in heads], rows)


def figure(found: Sequence[Curve]) -> bytes:
    """The loss curves: of the normalisation on the left, of the starts on the right."""
    drawn, both = panels(10.4, 3.6, 2)
    named = {curve.name: curve for curve in found}
    for name in named:
        colour, line = _LOOKS[name]
        both[0].plot([], [], color=colour, ls=line, lw=1.7, label=name)
    for axes, names in zip(both, (LEFT, RIGHT), strict=True):
        for name in names:
            colour, line = _LOOKS[name]
            axes.plot(named[name].steps, named[name].losses, color=colour, ls=line, lw=1.7)
        axes.set_xlabel("training steps", color=INK)
        axes.set_ylabel("training loss", color=INK)
        axes.grid(color=INK, alpha=0.1, lw=0.8)
    legend(both[0], drawn)
    return render(drawn)


def run(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder for the figure and the tables.")
    ] = Path("runs/appendix-a"),
    task: Annotated[str, typer.Option(metavar="NAME", help="A task of the tables.")] = "atlas-bart",
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder with the files that some tasks read.")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=10, help="Steps of each training.")] = 300,
    facts: Annotated[int, typer.Option(metavar="N", min=1, help="Facts for the magnitudes.")] = 500,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of every training.")] = 0,
) -> None:
    """Measure, print and write."""
    with show_progress() as progress:
        bench = Stored(data, progress=progress).bench(task)
        config = TrainConfig(
            steps=steps,
            warmup=min(100, steps // 5),
            validate_every=steps,
            seed=seed,
            text=1 if bench.task.passages else 0,
        )
        tables = [
            magnitude_table(magnitudes(bench.lm, find_sites(bench.lm.model), bench.task.train[:facts])),
            curve_table(trained := curves(bench, config, {}, progress)),
        ]
    for table in tables:
        print_table(table)
    text = "\n\n".join(to_markdown(table).strip() for table in tables) + "\n"
    for name, content in (("appendix_a.svg", figure(trained)), ("appendix_a.md", text.encode())):
        with new_file(out / name) as temporary:
            temporary.write_bytes(content)
    note(f"Wrote {out / 'appendix_a.svg'} and {out / 'appendix_a.md'}.")


program = program_of(run, HELP)

if __name__ == "__main__":
    program(prog_name="python -m reproduction.mend_paper.appendix_a")
