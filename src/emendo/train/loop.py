"""The training loop: schedule, validation, early stopping, checkpoints, interruption."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emendo.data import Record
from emendo.editors.gradient import GradientEditor
from emendo.editors.objective import Episode, Outcome
from emendo.errors import StorageError, TrainingError
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.loading import cache_folder
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress
from emendo.train import checkpoint
from emendo.train.config import TrainConfig
from emendo.train.episodes import GROUP, Episodes
from emendo.train.step import Ahead, look_ahead, training_step, validation_step

_LOG = logging.getLogger(__name__)
_OWN = 512
"""Passages that a decoder writes to be kept, at most."""
_BAD_IN_A_ROW = 5
_REPORT_EVERY = 10


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a run.

    Attributes:
        editor: the best editor by validation score, in eval mode.
        steps: optimiser steps done.
        seconds: time spent, the trunk's included.
        stopped: ``"finished"``, ``"early"`` (no better validation), ``"time"`` or ``"interrupted"``.
        history: rows of figures, as they were reported.
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
        records: to learn from.
        validation: to choose the best editor by, and to stop early; never learnt from.
        config: settings.
        out: folder for checkpoints; without it nothing is written and nothing can be resumed.
        resume: go on from the checkpoint in ``out``; the losses are those of an uninterrupted run.
        passages: running text for ``config.text``; without any, a decoder writes it itself
            (:func:`emendo.models._sampling.own_passages`).
        progress: receives the steps and the validations.

    Raises:
        TrainingError: nothing to train on, or non-finite losses several steps in a row.
        StorageError: no checkpoint to resume, one of other settings, or one that cannot be written.
        MismatchError: the editor belongs to another model.
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
        editor.belong(lm)
        self.editor, self.config, self.out = editor, config, out
        self.progress = progress
        self.began = time.monotonic()
        self.episodes = Episodes(lm, records, config, passages or self._own(lm))
        self.held_out = held_out(lm, validation, config)
        trunk = Trunk(lm.model, editor.sites)
        kind = f"{lm.fingerprint}-{trunk.block}-{lm.dtype}"  # what is computed in bf16 is less exact
        folder = cache_folder() / "trunk" / kind if out is not None else None
        self.store = TrunkCache(trunk, folder)
        editor.begin(lm)
        self.optimizer = torch.optim.Adam(editor.parameter_groups(config.lr), fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.state = checkpoint.State(settings=_settings(lm, editor, config, records))
        self.best: dict[str, Tensor] = {}
        self._group = -1  # the group of steps that was looked ahead at
        self._looked: list[tuple[list[Episode], Ahead]] = []
        self.recent: deque[Outcome] = deque(maxlen=50)

    def _own(self, lm: LM) -> list[str]:
        """What the model writes by itself, as much as the run can use."""
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
        weights = self.editor.weights(self.config.weights)
        outcome = training_step(self.editor, self.store, batch, weights, ahead, self.config.together)
        norm = nn.utils.clip_grad_norm_(self.editor.parameters(), self.config.clip)
        if outcome is None or not bool(norm.isfinite()):
            self._skip()
        else:
            self.state.bad_in_a_row = 0
            rate = self.config.rate(self.state.step, self.state.seconds)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * rate
            self.optimizer.step()
            self.editor.learnt(outcome)
            self.recent.append(outcome)
        self.state.step += 1
        if self.state.step % _REPORT_EVERY == 0 and self.recent:
            self._report()

    def _ahead(self) -> tuple[list[Episode], Ahead]:
        """This step's batch; at the first step of a group, the whole group is looked at.

        A run that is resumed inside a group looks at all of it too, and so sees the very same numbers.
        """
        group, place = divmod(self.state.step, GROUP)
        if self._group != group:
            window = self.episodes.window(group * GROUP)
            if window is not None:
                self._ensure(window)
                if self.editor.looks_ahead:  # in one file, and not in one for every group
                    self.store.ensure_unedited(text for episode in window for text in episode.locality)
            self._looked = []  # the last group's factors go before this one's come
            batches = [self.episodes.batch(group * GROUP + i) for i in range(GROUP)]
            self._ensure([episode for batch in batches for episode in batch])
            self._looked = list(zip(batches, look_ahead(self.editor, self.store, batches), strict=True))
            self._group = group
        return self._looked[place]

    def _ensure(self, episodes: Sequence[Episode]) -> None:
        missing = self.store.missing(text for episode in episodes for text in episode.texts())
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            self.progress.update("frozen part", done, len(missing))

        self.store.ensure(missing, tell)

    def _skip(self) -> None:
        self.state.bad += 1
        self.state.bad_in_a_row += 1
        if self.state.bad_in_a_row >= _BAD_IN_A_ROW:
            raise TrainingError(
                f"{_BAD_IN_A_ROW} steps in a row gave a loss or gradient that is not finite, the last at step "
                f"{self.state.step}. Lower --lr, or load the model with --dtype float32 or bfloat16."
            )

    def _report(self) -> None:
        means = figures(mean(self.recent))
        done = max(1e-9, self.config.done(self.state.step, self.state.seconds))
        shown = {
            **means,
            "episodes/s": self.state.step * self.config.batch / max(1e-9, self.state.seconds),
            "time left": self.state.seconds * (1 - done) / done,
        }
        self.state.history.append({"step": self.state.step, **means})
        self.progress.update("training", self.state.step, self.config.steps, shown)

    def _validate(self) -> None:
        """Keep the best editor, and count the validations since then."""
        if not self.held_out:
            return
        self.state.validated = self.state.step
        self._ensure([episode for batch in self.held_out for episode in batch])
        weights, together = self.config.weights, self.config.together
        steps = [
            validation_step(self.editor, self.store, batch, weights, together) for batch in self.held_out
        ]
        outcomes = [found for found in steps if found is not None]
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
        self.editor.validated(outcome)
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
    """What makes two runs the same run, as JSON values."""
    return {
        "editor": editor.name,
        "config": asdict(editor.config),
        "sites": [site.name for site in editor.sites],
        "model": editor.fingerprint,
        "records": len(records),
        # named only where they are not the usual, so that runs of before these can go on
        **({"chat": True} if editor.chat else {}),
        **({"dtype": lm.dtype} if lm.dtype != "float32" else {}),
        **{k: v for k, v in asdict(config).items() if k != "checkpoint_every"},
    }


# --------------------
# Facts held out: what the best editor is chosen by.

MARGIN = 0.02
"""Scores on a hundred facts that differ by less are alike; of alike editors the later one is kept."""


def held_out(lm: LM, records: Sequence[Record], config: TrainConfig) -> list[list[Episode]]:
    """The episodes of the first ``validate_on`` records, in batches; none where they do not make one edit."""
    records = records[: config.validate_on]
    size = min(config.batch, len(records) // config.together * config.together)
    if not size:
        return []
    plain = TrainConfig(
        batch=size, together=config.together, near=max(1, config.near), sibling=0, seed=config.seed
    )
    episodes = Episodes(lm, records, plain)
    return [episodes.batch(step) for step in range(math.ceil(len(records) / size))]


def harmonic_mean(*values: float) -> float:
    """The harmonic mean: the score that the best editor is chosen by, low as soon as one of the three is.

    Of editors whose scores are alike the later one is kept. The loss would choose worse: its mean KL hangs on a few
    locality texts whose answer flips (docs/log.md).
    """
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def mean(outcomes: Collection[Outcome]) -> Outcome:
    """The mean of every figure."""
    rows = [asdict(outcome) for outcome in outcomes]
    return Outcome(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def figures(outcome: Outcome) -> dict[str, float]:
    """An outcome under the short names of reports."""
    short = {"edit_loss": "edit", "locality_loss": "KL"}
    return {short.get(name, name): value for name, value in asdict(outcome).items()}


# --------------------
# Ctrl-C in a loop of steps.


@contextmanager
def interruptible() -> Iterator[Any]:
    """Ctrl-C asks the loop to stop after its step; a second one stops at once. Elsewhere signals stay as they are."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        _LOG.warning(
            "Stopping after this step. Ctrl-C again stops at once; then only the last checkpoint is kept."
        )

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread
        yield lambda: asked
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
