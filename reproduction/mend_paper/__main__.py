"""The tables of the MEND paper: ``python -m reproduction.mend_paper``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import Interrupted, emit, note
from reproduction.mend_paper.program import program_of

HELP = """Make the tables of the MEND paper: every editor on the same facts, beside the paper's figures.

Trains the editors that need training, edits held-out facts, prints edit success and drawdown with 95% intervals, and
writes compare.html, compare.md and compare.csv. Each cell is saved as soon as it is done and never repeated. Ctrl-C
loses nothing; the same command resumes the run.

\b
Presets:
  table4    small models: fact-checking, question answering, generation
  table3    the largest available model, on CounterFact
  table5    many edits at once
  table6    MEND without each of its parts
  eq5       ENN by its base, edit and locality losses
  table9    attention matrices instead of MLP matrices
  table11   a cache instead of an editor
  figure4   memory during training
  paper-table3, -table4, -table5, -table6, -table9, -table11
            the same tables on the paper's own models and data, from files
            (docs/how-to/paper-models.md)
  norms     fine-tuning under each norm, from loose to tight, beside MEND

\b
Examples:
  python -m reproduction.mend_paper --preset table4 --data ./data --out runs/compare
  python -m reproduction.mend_paper --preset table4 --tasks atlas-bart --editors ft,mend --scale 0.2
  python -m reproduction.mend_paper --preset all --data ./data --list
  python -m reproduction.mend_paper --preset paper-table3 --data ./mend-data --device cuda
"""

Presets = Annotated[
    list[str],
    typer.Option(
        "--preset", metavar="NAME", help="A table to make, or all of the stand-ins' (may be repeated)."
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="The folder for cells, trained editors and pages.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="A folder with counterfact-train.json, counterfact-dev.json and wikitext2-valid.txt, for the tasks "
        "counterfact and wikitext; the other tasks need no files.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="NAMES", help="Only these tasks, with commas between.  [default: all]"),
]
Editors = Annotated[
    str | None,
    typer.Option(
        "--editors", metavar="NAMES", help="Only these editors, with commas between.  [default: all]"
    ),
]
Scale = Annotated[
    float, typer.Option("--scale", metavar="X", help="Multiplies training steps and test facts.")
]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes-per-cell",
        metavar="X",
        help="The time limit of each training.  [default: no limit]",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", help="Seed of the editors' initial parameters and of the order of the facts."
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        "--seeds",
        metavar="N",
        min=1,
        help="The number of seeds, counted from --seed; the tables show mean and range.",
    ),
]
List = Annotated[bool, typer.Option("--list", help="List the cells with their estimated time; run nothing.")]


def run(
    ctx: typer.Context,
    preset: Presets,
    out: Out = Path("runs/compare"),
    data: Data = None,
    tasks: Tasks = None,
    editors: Editors = None,
    scale: Scale = 1.0,
    minutes: Minutes = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    listed: List = False,
    as_json: opt.AsJson = False,
) -> None:
    """Make the paper's tables."""
    from reproduction.mend_paper.budgets import Choice
    from reproduction.mend_paper.cells import Cell, Folder
    from reproduction.mend_paper.display import Shown, as_values, listing, show, write
    from reproduction.mend_paper.grid import Grid, seeded
    from reproduction.mend_paper.presets import build, names_of
    from reproduction.mend_paper.runner import Runner
    from reproduction.mend_paper.sources import Stored
    from reproduction.mend_paper.tasks import check

    choice = Choice(_names(tasks), _names(editors), scale, seed, dtype, minutes)
    wanted = [build(name, choice) for name in names_of(preset)]
    folder = Folder(out)
    cells = [each for table in wanted for cell in table.cells.values() for each in seeded(cell, seeds)]
    if listed:
        listing(cells, folder.latest(), as_json=as_json)
        return
    check(dict.fromkeys(cell.task for cell in cells if isinstance(cell, Cell)), data)
    view, stopped, command = Shown(), False, _command(ctx)
    try:
        Runner(folder, Stored(data, dtype, view.training(), device), view).run(cells)
    except KeyboardInterrupt:
        stopped = True
    finally:
        view.close()
    latest = folder.latest()
    grids = [Grid.of(table, latest, seeds) for table in wanted]
    write(folder, choice, latest, seeds, command)
    if as_json:
        emit(as_values(grids))
    else:
        show(grids)
        note(f"Wrote {out / 'compare.html'}, {out / 'compare.md'} and {out / 'compare.csv'}.")
    if stopped:
        raise Interrupted(f"finished cells are kept in {out}. Continue with: {command}")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _command(ctx: typer.Context) -> str:
    """The command that makes these tables, with the options that differ from their defaults."""
    parts = ["python -m reproduction.mend_paper"]
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if value != param.default and param.name not in ("listed", "as_json"):
            each = value if isinstance(value, list | tuple) else [value]
            parts += [f"{param.opts[0]} {one}" for one in each]
    return " ".join(parts)


program = program_of(run, HELP, no_args_is_help=True)

if __name__ == "__main__":
    program(prog_name="python -m reproduction.mend_paper")
