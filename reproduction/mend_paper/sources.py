"""Sources of a comparison's tasks and models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emendo.data.schema import Probe, Record
from emendo.models.lm import LM
from emendo.models.loading import load
from emendo.progress import SILENT, Progress
from emendo.train.presets import MODELS
from reproduction.mend_paper import tasks, zoo
from reproduction.mend_paper.budgets import PAPER_TASKS
from reproduction.mend_paper.tasks import Task


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A task and its model, loaded."""

    task: Task
    lm: LM

    @property
    def sizes(self) -> dict[str, int]:
        """The number of items of each kind of data."""
        names = ("train", "validation", "test", "passages", "test_passages")
        return {name: len(getattr(self.task, name)) for name in names}


class Source(Protocol):
    """Provides tasks and models."""

    def bench(self, task: str) -> Bench:
        """A task and its model."""

    def material(self, model: str) -> tuple[str | Path, Sequence[Record]]:
        """The name or folder to load a model from, and records to train on it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Tasks by name, with models that are built in or trained here on first use.

    Attributes:
        data: the folder with the files that some tasks read.
        dtype: of the models, but for the paper's own, which have theirs.
        progress: receives the progress of making a model or data.
        device: of the models.
    """

    data: Path | None = None
    dtype: str = "float32"
    progress: Progress = SILENT
    device: str | None = None

    def bench(self, task: str) -> Bench:
        """A task and its model.

        Raises:
            RequestError: there is no such task.
            DataError: a file that it needs is missing or malformed.
            ModelError: its model cannot be made or loaded.
        """
        found = tasks.task(task, data=self.data, progress=self.progress)
        own = PAPER_TASKS.get(task)
        dtype = MODELS[own].dtype if own else self.dtype
        return Bench(found, load(self._place(found.model), dtype=dtype, device=self.device))

    def material(self, model: str) -> tuple[str | Path, Sequence[Record]]:
        """The name or folder to load a model from, and records: those of the task of its name, else built-in facts.

        Raises:
            ModelError: it cannot be made.
        """
        task = tasks.task(model if model in zoo.RECIPES else "atlas", progress=self.progress)
        return self._place(model), task.train[:100]

    def _place(self, model: str) -> str | Path:
        return zoo.make(model, self.progress) if model in zoo.RECIPES else model


def probes(task: Task) -> list[Probe]:
    """Prompts whose answers an edit must not change: the training records' locality prompts, and passages.

    A passage is cut in two: its second half is the answer to its first.
    """
    halves = [(words, len(words) // 2) for words in map(str.split, task.passages) if len(words) > 1]
    return [
        *(probe for record in task.train for probe in (*record.neighbours, *record.unrelated)),
        *(Probe(" ".join(words[:half]), " ".join(words[half:])) for words, half in halves),
    ]
