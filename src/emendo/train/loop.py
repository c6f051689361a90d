"""The training loop: schedule, validation, early stopping, checkpoints, interruption."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emendo._storage import cache_folder
from emendo.data import Record
from emendo.editors.gradient import Ahead, GradientEditor
from emendo.editors.objective import Episode, Outcome
from emendo.errors import StorageError, TrainingError
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress
from emendo.train import checkpoint
from emendo.train.config import TrainConfig
from emendo.train.episodes import GROUP, Episodes
from emendo.train.step import (
    MARGIN,
    figures,
    harmonic_mean,
    held_out,
    mean,
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
    """

    editor: GradientEditor
    steps: int
    seconds: float
    stopped: str
    history: list[dict[str, float]]


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

    Raises:
        TrainingError: no records, or non-finite losses several steps in a row.
        StorageError: no checkpoint to resume, one of other settings, or one that cannot be written.
        MismatchError: the editor is bound to another model.
    """
    return _Run(lm, editor, records, validation, config or TrainConfig(), out, passages, progress).go(resume)


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
    ) -> None:
        editor.bind(lm)
        self.editor, self.config, self.out = editor, config, out
        self.progress = progress
        self.began = time.monotonic()
        passages, base = passages or self._own(lm), editor.base_texts
        self.episodes = Episodes(lm, records, config, passages, base)
        self.held_out = held_out(lm, validation, config, passages, base)
        trunk = Trunk(lm.model, editor.sites)
        kind = f"{lm.fingerprint}-{trunk.block}-{lm.dtype}"  # outputs in bf16 are less exact
        folder = cache_folder() / "trunk" / kind if out is not None else None
        self.store = TrunkCache(trunk, folder)
        self.optimizer = torch.optim.Adam(editor.parameter_groups(config.lr), fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.state = checkpoint.State(settings=_settings(lm, editor, config, records))
        self.best: dict[str, Tensor] = {}
        self._group = -1  # the group of steps in self._looked
        self._looked: list[tuple[list[Episode], Ahead]] = []
        self._reported = 0.0
        self.observes = editor.observes  # before a checkpoint is read: it has statistics
        self.recent: deque[Outcome] = deque(maxlen=50)

    def _own(self, lm: LM) -> list[str]:
        """Passages written by the model itself, as many as the run can use."""
        config = self.config
        if lm.kind != "causal" or not config.text:
            return []
        folder = cache_folder() / "written" if self.out is not None else None
        return own_passages(lm, min(_OWN, config.steps * config.batch * config.text), folder)

    def go(self, resume: bool) -> TrainResult:
        if resume:
            self._resume()
        started = self.began - self.state.seconds
        saved = time.monotonic()
        stopped = "finished"
        with interruptible() as interrupted:
            self._observe(interrupted)
            while self.state.step < self.config.steps:
                self.state.seconds = time.monotonic() - started
                if interrupted():
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
                if self.state.step % self.config.validate_every == 0:
                    self._validate()
                if self.out and time.monotonic() - saved >= self.config.checkpoint_every:
                    self._save()
                    saved = time.monotonic()
            if stopped != "interrupted" and self.state.step != self.state.validated:
                self._validate()
            if self.out:
                self._save()
        return self._result(stopped)

    def _observe(self, interrupted: Callable[[], bool]) -> None:
        """Show the editor the factors of the training facts; a resumed pass goes on after its last chunk."""
        texts = self.episodes.edits(self.observes)
        saved = time.monotonic()
        while self.state.observed < len(texts) and not interrupted():
            chunk = texts[self.state.observed : self.state.observed + _CHUNK]
            self._ensure_texts(chunk)
            self.editor.observe_texts(self.store, chunk)
            self.state.observed += len(chunk)
            self.progress.update("statistics", self.state.observed, len(texts))
            if self.out and time.monotonic() - saved >= self.config.checkpoint_every:
                self._save()
                saved = time.monotonic()

    def _result(self, stopped: str) -> TrainResult:
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
        return TrainResult(self.editor.eval(), state.step, state.seconds, stopped, state.history)

    def _step(self) -> None:
        batch, ahead = self._ahead()
        self.editor.train()
        self.optimizer.zero_grad()
        weights, together = self.config.weights, self.config.together
        outcome = training_step(self.editor, self.store, batch, weights, ahead, together)
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
        if self.recent:
            self._report()

    def _ahead(self) -> tuple[list[Episode], Ahead]:
        """This step's batch; the first step of a group prepares the whole group.

        A run that is resumed inside a group prepares all of it too, and so computes identical numbers.
        """
        group, place = divmod(self.state.step, GROUP)
        if self._group != group:
            window = self.episodes.window(group * GROUP) or []
            batches = [self.episodes.batch(group * GROUP + i) for i in range(GROUP)]
            self._ensure([*window, *(episode for batch in batches for episode in batch)])
            self._looked = []  # frees the last group's factors before this one's are computed
            self._looked = list(
                zip(batches, self.editor.look_ahead(self.store, batches, window), strict=True)
            )
            self._group = group
        return self._looked[place]

    def _ensure(self, episodes: Sequence[Episode]) -> None:
        self._ensure_texts(text for episode in episodes for text in episode.texts())

    def _ensure_texts(self, texts: Iterable[Text]) -> None:
        missing = self.store.missing(texts)
        done = 0

        def computed(count: int) -> None:
            nonlocal done
            done += count
            self.progress.update("frozen part", done, len(missing))

        self.store.ensure(missing, computed)

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
        self.state.validated = self.state.step
        self._ensure([episode for batch in self.held_out for episode in batch])
        weights, together = self.config.weights, self.config.together
        outcomes = []
        for done, batch in enumerate(self.held_out, 1):
            found = validation_step(self.editor, self.store, batch, weights, together)
            outcomes += [] if found is None else [found]
            self.progress.update("validation", done, len(self.held_out))
        if not outcomes:
            return
        outcome = mean(outcomes)
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

    def _save(self) -> None:
        assert self.out is not None
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


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM stop a loop after its present step; a second signal stops it at once.

    Outside the main thread signals keep their handlers.

    Yields:
        Whether a signal has arrived.
    """
    arrived = False

    def handle(number: int, frame: object) -> None:
        nonlocal arrived
        if arrived:
            raise KeyboardInterrupt
        arrived = True
        _LOG.warning(
            "Stopping after this step. Ctrl-C again stops at once; then only the last checkpoint is kept."
        )

    handlers: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread
                handlers[number] = signal.signal(number, handle)
        yield lambda: arrived
    finally:
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
