"""Training runs, for `emendo train` and `emendo demo`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from emendo.cli._console import Interrupted, note
from emendo.cli._loading import passages, training_records
from emendo.cli._progress import show_progress
from emendo.cli._runs import Run
from emendo.cli._settings import site_choice
from emendo.data import Record
from emendo.editors import GradientEditor, trained_class
from emendo.errors import EmendoError, LostProcessError
from emendo.models.loading import LM
from emendo.models.sites import find_sites
from emendo.progress import SILENT
from emendo.train import TrainResult, train
from emendo.train.episodes import Episodes
from emendo.train.processes import World


def carry_out(run: Run, lm: LM, world: World | None = None) -> Run:
    """Train the run's editor, from the start or from its checkpoint, and save it.

    Args:
        run: the run.
        lm: its model.
        world: the processes that share the run; the main one writes into its folder.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the message names what was saved.
        EmendoError: an input does not fit; a new run then leaves the folder unchanged.
    """
    world = world or World()
    settings = run.settings
    records, validation, skipped = training_records(settings, lm)
    texts = passages(settings.text)
    editor = new_editor(run, lm)
    if not run.resuming and (run.folder / "run.json").exists():
        Episodes(
            lm, records, settings.config, texts
        )  # refuses what cannot be learnt before the older run goes
    run = run.begin([*records, *validation], writes=world.main)
    resume = run.resuming and run.has_checkpoint
    note(_beginning(lm, editor, len(records), len(validation), resume))
    again = f"emendo train --out {run.folder} --resume"
    if run.command == "demo":
        again = f"emendo demo --train --out {run.folder}"
    try:
        with show_progress() if world.main else nullcontext(SILENT) as progress:
            result = train(
                lm,
                editor,
                records,
                validation,
                settings.config,
                out=run.folder,
                resume=resume,
                passages=texts,
                progress=progress,
                world=world,
            )
    except LostProcessError:
        if world.main:
            note(f"Continue on any number of processes with: {again}")
        raise
    except EmendoError:
        if world.main and not run.has_checkpoint:
            run.clear()
        raise
    except KeyboardInterrupt:
        kept = "the last checkpoint is kept" if run.has_checkpoint else "there was nothing to save yet"
        raise Interrupted(f"{kept}. Continue with: {again}") from None
    if result.stopped == "interrupted":
        raise Interrupted(f"step {result.steps} is saved in {run.folder}. Continue with: {again}")
    if not world.main:
        return run
    result.editor.info |= {"model_name": settings.model, "data": settings.data}
    figures = _result(run, result, records, validation, skipped) | {"processes": world.size}
    return run.finish(result.editor, result.history, figures)


def new_editor(run: Run, lm: LM) -> GradientEditor:
    """The untrained editor of a run, the same at every call.

    Raises:
        RequestError: the method is not one to train.
    """
    settings = run.settings
    kind = trained_class(settings.editor)
    sites = find_sites(lm.model, site_choice(settings.sites), last=settings.last)
    torch.manual_seed(settings.config.seed)
    return kind(sites, kind.Config(**settings.editor_settings)).to(lm.device)


def _beginning(lm: LM, editor: GradientEditor, records: int, validation: int, resume: bool) -> str:
    size = sum(parameter.numel() for parameter in editor.parameters()) / 1e6
    return (
        f"{'Continuing' if resume else 'Training'} a {editor.name} editor of {size:.1f} million parameters at "
        f"{len(editor.sites)} weight matrices of {lm.name}, on {records} facts ({validation} more for validation). "
        "Ctrl-C saves and stops."
    )


def _result(
    run: Run, result: TrainResult, records: Sequence[Record], validation: Sequence[Record], skipped: int
) -> dict[str, Any]:
    """The object that `emendo train --json` prints."""
    marked = "validation "
    seen = [row for row in result.history if math.isfinite(row.get(f"{marked}loss", math.nan))]
    best = next((row for row in reversed(seen) if row[f"{marked}kept"]), {})
    return {
        "out": str(run.folder),
        "editor": run.settings.editor,
        "model": run.settings.model,
        "fingerprint": result.editor.fingerprint,
        "parameters": sum(p.numel() for p in result.editor.parameters()),
        "records": len(records),
        "validation_records": len(validation),
        "skipped": skipped,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "episodes_per_second": round(result.rate, 3),
        "efficiency": round(result.efficiency, 3),
        "stopped": result.stopped,
        "skipped_steps": result.editor.info["skipped_steps"],
        "validation": {name.removeprefix(marked): value for name, value in best.items()},
    }
