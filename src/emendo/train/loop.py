"""The training loop: schedule, validation, early stopping, checkpoints, interruption."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emendo._storage import cache_folder
from emendo.data import Record
from emendo.editors._nets import RunningStats
from emendo.editors.gradient import GradientEditor
from emendo.editors.objective import Outcome
from emendo.errors import LostProcessError, RequestError, StorageError, TrainingError
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress
from emendo.train import checkpoint
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes
from emendo.train.interruption import interruptible
from emendo.train.preparation import Preparation
from emendo.train.processes import World
from emendo.train.step import (
    MARGIN,
    figures,
    harmonic_mean,
    held_out,
    joint_mean,
    joint_outcome,
    mean,
    sum_gradients,
    training_step,
    validation_step,
)

_LOG = logging.getLogger(__name__)
_OWN = 512
"""Largest number of passages that a decoder writes for the locality loss."""
_BAD_IN_A_ROW = 5
_REPORT_EVERY = 10
_CHUNK = 64
"""Facts of the pass before training that are computed together."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run.

    Attributes:
        editor: the best editor by validation score, in eval mode.
        steps: optimiser steps done.
        seconds: time spent, the trunk's included.
        stopped: ``"finished"``, ``"early"`` (no better validation), ``"time"`` or ``"interrupted"``.
        history: rows of reported figures.
        rate: episodes a second of this session, of all processes together.
        efficiency: share of this session that a process did not spend waiting for the others; 1 for a single one.
    """

    editor: GradientEditor
    steps: int
    seconds: float
    stopped: str
    history: list[dict[str, float]]
    rate: float
    efficiency: float


def train(
    lm: LM,
    editor: GradientEditor,
    records: Sequence[Record],
    validation: Sequence[Record],
    config: TrainConfig | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    passages: Sequence[str] = (),
    progress: Progress = SILENT,
    world: World | None = None,
) -> TrainResult:
    """Train an editor on records.

    Args:
        lm: the model; frozen, and handed back as it came.
        editor: what to train, in place.
        records: the training data.
        validation: records that the best editor is chosen by and that stop the run early; never trained on.
        config: settings.
        out: folder for checkpoints; without it nothing is written and the run cannot be resumed.
        resume: continue from the checkpoint in ``out``; the losses equal those of an uninterrupted run.
        passages: running text for ``config.text``; without any, a decoder writes it itself
            (:func:`emendo.models._sampling.own_passages`).
        progress: receives the steps and the validations.
        world: the processes that share the run, each of which makes this call; the folders must be on a disk that all
            of them see. The editor is the main process's.

    Raises:
        TrainingError: no records, non-finite losses several steps in a row, or processes with different runs.
        LostProcessError: another process has ended; the finished steps are saved.
        RequestError: more processes than edits in a batch.
        StorageError: no checkpoint to resume, one of other settings, or one that cannot be written.
        MismatchError: the editor is bound to another model.
    """
    run = _Run(
        lm, editor, records, validation, config or TrainConfig(), out, passages, progress, world or World()
    )
    return run.go(resume)


class _Run:
    def __init__(
        self,
        lm: LM,
        editor: GradientEditor,
        records: Sequence[Record],
        validation: Sequence[Record],
        config: TrainConfig,
        out: Path | None,
        passages: Sequence[str],
        progress: Progress,
        world: World,
    ) -> None:
        editor.bind(lm)
        self.editor, self.config, self.out, self.world = editor, config, out, world
        self.progress = progress
        self.began = time.monotonic()
        self.state = checkpoint.State(settings=_settings(lm, editor, config, records))
        self._meet()
        passages, base = passages or self._own(lm), editor.base_texts
        self.episodes = Episodes(lm, records, config, passages, base)
        self.held_out = held_out(lm, validation, config, passages, base)
        trunk = Trunk(lm.model, editor.sites)
        kind = f"{lm.fingerprint}-{trunk.block}-{lm.dtype}"  # outputs in bf16 are less exact
        folder = cache_folder() / "trunk" / kind if out is not None else None
        self.store = TrunkCache(trunk, folder)
        self.ahead = Preparation(self.world, editor, self.episodes, self.store, progress)
        self.optimizer = torch.optim.Adam(editor.parameter_groups(config.lr), fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.best: dict[str, Tensor] = {}
        self._undo: dict[str, Tensor] = {}  # the buffers from before a piece of work that is not finished
        self._reported = 0.0
        self.observes = editor.observes  # before a checkpoint is read: it has statistics
        self.recent: deque[Outcome] = deque(maxlen=50)

    def _own(self, lm: LM) -> list[str]:
        """Passages written by the model itself, as many as the run can use."""
        config = self.config
        if lm.kind != "causal" or not config.text:
            return []
        folder = cache_folder() / "written" if self.out is not None else None
        count = min(_OWN, config.steps * config.batch * config.text)
        return self.world.from_main(lambda: own_passages(lm, count, folder))

    def _meet(self) -> None:
        """Make sure that all processes have the same run, and give them the main one's editor."""
        if self.world.size == 1:
            return
        if self.world.size > (edits := self.config.batch // self.config.together):
            raise RequestError(
                f"{self.world.size} processes cannot share a batch of {edits} edits: start fewer, or raise --batch."
            )
        if self.world.from_main(lambda: self.state.settings) != self.state.settings:
            raise TrainingError(
                "The processes were given different runs; give all of them the same options and files."
            )
        state = self.world.from_main(lambda: {k: v.cpu() for k, v in self.editor.state_dict().items()})
        self.editor.load_state_dict(state)

    def go(self, resume: bool) -> TrainResult:
        if resume:
            self._resume()
        first = self.state.step
        statistics = [module for module in self.editor.modules() if isinstance(module, RunningStats)]
        try:
            for module in statistics:
                module.gather = self.world.gather if self.world.size > 1 else None
            with self.store.trunk.holding_the_rest(), interruptible() as interrupted:
                stopped = self._go(interrupted)
        except LostProcessError as error:
            raise self._lost(error) from error
        finally:
            for module in statistics:
                module.gather = None
        return self._result(stopped, first)

    def _go(self, interrupted: Callable[[], bool]) -> str:
        """The whole run; returns why it stopped."""
        started = self.began - self.state.seconds
        saved = time.monotonic()
        stopped = "finished"

        def agreed() -> bool:
            """Whether any process was interrupted; the main one's clock becomes that of all."""
            own = torch.tensor([time.monotonic() - started, float(interrupted())], dtype=torch.float64)
            seen = self.world.gather(own)
            self.state.seconds = float(seen[0, 0])
            return bool(seen[:, 1].any())

        self._observe(agreed)
        if self.state.step and self._due():  # a process was lost during this validation
            self._validate()
        while self.state.step < self.config.steps:
            if agreed():
                stopped = "interrupted"
                break
            if self.state.stale >= self.config.patience:
                stopped = "early"
                break
            if self.config.minutes is not None and self.state.seconds >= self.config.minutes * 60:
                stopped = "time"
                break
            self._step()
            self.state.seconds = time.monotonic() - started
            if self._due():
                self._validate()
            if time.monotonic() - saved >= self.config.checkpoint_every:
                self._save()
                saved = time.monotonic()
        if stopped != "interrupted" and self.state.step != self.state.validated:
            self._validate()
        self._save()
        return stopped

    def _due(self) -> bool:
        return self.state.step % self.config.validate_every == 0 and self.state.validated != self.state.step

    def _observe(self, interrupted: Callable[[], bool]) -> None:
        """Show the editor the factors of the training facts; a resumed pass goes on after its last chunk."""
        texts = self.episodes.edits(self.observes)
        saved = time.monotonic()
        if self.store.trunk.streams:  # all at once, as each block must be read for it
            self.ahead.ensure_texts(texts, texts)
        while self.state.observed < len(texts) and not interrupted():
            chunk = texts[self.state.observed : self.state.observed + _CHUNK]
            own = self.world.share(chunk)
            self.ahead.ensure_texts(chunk, own)
            self._remember()
            self.editor.observe_texts(self.store, own)
            self.state.observed += len(chunk)
            self._undo = {}
            self.progress.update("statistics", self.state.observed, len(texts))
            if time.monotonic() - saved >= self.config.checkpoint_every:
                self._save()
                saved = time.monotonic()

    def _result(self, stopped: str, first: int) -> TrainResult:
        if self.best and stopped != "interrupted":
            self.editor.load_state_dict(self.best)
        state = self.state
        self.editor.info = {
            **state.settings,
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "stopped": stopped,
            "skipped_steps": state.bad,
        }
        seconds = max(1e-9, time.monotonic() - self.began)
        waited = float(self.world.gather(torch.tensor([self.world.waited])).mean())
        return TrainResult(
            self.editor.eval(),
            state.step,
            state.seconds,
            stopped,
            state.history,
            (state.step - first) * self.config.batch / seconds,
            max(0.0, 1 - waited / seconds),
        )

    def _step(self) -> None:
        batch, ahead, finite = self.ahead.step(self.state.step)
        self.editor.train()
        self.optimizer.zero_grad()
        self._remember()
        weights, together = self.config.weights, self.config.together
        outcome = None
        if finite:
            outcome = training_step(self.editor, self.store, batch, weights, ahead, together)
        outcome = joint_outcome(self.world, outcome, batch)
        if outcome is not None:
            sum_gradients(self.world, list(self.editor.parameters()), len(batch) / self.config.batch)
        norm = nn.utils.clip_grad_norm_(self.editor.parameters(), self.config.clip)
        if outcome is None or not bool(norm.isfinite()):
            self._skip()
        else:
            self.state.bad_in_a_row = 0
            rate = self.config.rate(self.state.step, self.state.seconds)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * rate
            self.optimizer.step()
            self.editor.adapt(outcome)
            self.recent.append(outcome)
        self.state.step += 1
        self._undo = {}
        if self.recent:
            self._report()

    def _remember(self) -> None:
        """Keep the buffers, which change before the exchanges of a step are done."""
        if self.world.size > 1:
            self._undo = {name: buffer.clone() for name, buffer in self.editor.named_buffers()}

    def _skip(self) -> None:
        self.state.bad += 1
        self.state.bad_in_a_row += 1
        _LOG.info("Step %d skipped: a loss or gradient is not finite.", self.state.step)
        if self.state.bad_in_a_row >= _BAD_IN_A_ROW:
            raise TrainingError(
                f"{_BAD_IN_A_ROW} steps in a row gave a loss or gradient that is not finite, the last at step "
                f"{self.state.step}. Lower --lr, or load the model with --dtype float32 or bfloat16."
            )

    def _report(self) -> None:
        """Report running means: into the history every few steps, to the progress display also every second."""
        kept = self.state.step % _REPORT_EVERY == 0
        if not kept and time.monotonic() - self._reported < 1:
            return
        self._reported = time.monotonic()
        means = figures(mean(self.recent))
        done = max(1e-9, self.config.done(self.state.step, self.state.seconds))
        shown = {
            **means,
            "episodes/s": self.state.step * self.config.batch / max(1e-9, self.state.seconds),
            "time left": self.state.seconds * (1 - done) / done,
        }
        if kept:
            self.state.history.append({"step": self.state.step, **means})
        self.progress.update("training", self.state.step, self.config.steps, shown)

    def _validate(self) -> None:
        """Keep the best editor, and count the validations since it was found."""
        if not self.held_out:
            return
        own = self.held_out[self.world.rank :: self.world.size]
        self.ahead.ensure(chain(*self.held_out), chain(*own))
        weights, together = self.config.weights, self.config.together
        outcomes = []
        for done, batch in enumerate(own, 1):
            found = validation_step(self.editor, self.store, batch, weights, together)
            outcomes += [] if found is None else [found]
            self.progress.update("validation", done, len(own))
        outcome = joint_mean(self.world, outcomes)
        self.state.validated = self.state.step
        if outcome is None:
            return
        means = figures(outcome)
        score = harmonic_mean(means["success"], means["generalisation"], means["locality"])
        better = score >= self.state.best - MARGIN and (score > 0 or means["loss"] < self.state.best_loss)
        if better:
            self.state.best = max(score, self.state.best)
            self.state.best_loss, self.state.stale = means["loss"], 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.editor.state_dict().items()}
        else:
            self.state.stale += 1
        row = {**means, "score": score, "kept": float(better)}
        self.editor.adapt(outcome, validation=True)
        self.state.history.append(
            {"step": self.state.step, **{f"validation {name}": value for name, value in row.items()}}
        )
        self.progress.report(f"step {self.state.step:>5}", means, "best so far" if better else "")

    def _lost(self, error: LostProcessError) -> LostProcessError:
        """Save the finished steps after another process has ended."""
        if self.out is None or not self.world.main:
            return error
        self.editor.load_state_dict(self._undo, strict=False)
        self._save()
        return LostProcessError(f"{error} The run is saved at step {self.state.step} and can be resumed.")

    def _save(self) -> None:
        if self.out is None or not self.world.main:
            return
        self.state.recent = [asdict(outcome) for outcome in self.recent]
        checkpoint.save(self.out, self.state, self.editor, self.optimizer, self.best)

    def _resume(self) -> None:
        if self.out is None:
            raise StorageError("There is no output folder to resume from.")
        self.state, self.best = checkpoint.load(self.out, self.state.settings, self.editor, self.optimizer)
        self.recent.extend(Outcome(**row) for row in self.state.recent)


def _settings(
    lm: LM, editor: GradientEditor, config: TrainConfig, records: Sequence[Record]
) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON values."""
    return {
        "editor": editor.name,
        "config": asdict(editor.config),
        "sites": [site.name for site in editor.sites],
        "model": editor.fingerprint,
        "records": len(records),
        # left out at their defaults, so that runs from before these settings existed can be resumed
        **({"chat": True} if editor.chat else {}),
        **({"dtype": lm.dtype} if lm.dtype != "float32" else {}),
        **{k: v for k, v in asdict(config).items() if k != "checkpoint_every"},
    }
