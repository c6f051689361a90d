"""Tasks of the evaluation harness (EleutherAI's lm-eval), run on the clean model and on the model with its edits.

A run asks all questions of a task, so only one edited model is measured: the one with all edits of a sequence, or the
one with the first edit of several facts. Edits made one at a time give as many models as facts, and are not measured.
The harness runs the model itself, with the change attached beside its weights, so that its figures are those of an
exported edit. The only module with lm_eval.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emendo._storage import finite
from emendo.editors.base import Editor
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM

BATCH = 8
"""The number of questions that the harness asks at once."""


@dataclass(eq=False)
class Harness:
    """Tasks to run.

    Attributes:
        tasks: names of the harness's tasks, groups of tasks or tags.
        limit: the number of questions of each task, the first ones; None runs all.
        folder: a folder with additional task files (YAML).
        rows: after :meth:`compare`, the answers to every question, before and after.

    Raises:
        RequestError: no task, a limit below 1, a folder that does not exist, or the harness is not installed.
    """

    tasks: Sequence[str]
    limit: int | None = None
    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise RequestError(
                f"lm-eval: {','.join(self.tasks)!r} names no task; give one or several: task1,task2."
            )
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"lm-eval: limit={self.limit}: give a whole number from 1 up.")
        if self.folder is not None and not self.folder.is_dir():
            raise RequestError(f"lm-eval: {self.folder} is no folder; give a folder with task files (YAML).")
        if find_spec("lm_eval") is None:
            raise RequestError(
                "Tasks of the evaluation harness need lm-eval: pip install 'emendo[lm-eval]', or leave --lm-eval out."
            )

    def begin(self, lm: LM) -> None:
        """Find the tasks and run them on the clean model.

        Args:
            lm: the clean model, a decoder or an encoder-decoder.

        Raises:
            RequestError: there is no such task, its questions cannot be loaded, or the model is a classifier.
        """
        if lm.kind == "classifier":
            raise RequestError(
                f"lm-eval: {lm.name} is a classifier, which the harness cannot run; leave --lm-eval out."
            )
        self.rows = []
        self._manager = self._found()
        self._before = self._ask(lm, "before")

    def compare(self, host: LM, changes: Mapping[str, LowRank], edits: str) -> dict[str, Any]:
        """Run the same tasks on the model with its edits.

        Args:
            host: the model that the changes belong to.
            changes: by site name, ``[d_out, r]`` and ``[r, d_in]``.
            edits: a description of the edits.

        Returns:
            ``edits``, ``harness`` (its version and settings), and of each task and metric in ``scores`` the values
            before and after with their standard errors, as JSON values.
        """
        with applied(host.model, changes):
            after = self._ask(host, "after")
        scores = {
            name: {
                "before": before["value"],
                "before_stderr": before["stderr"],
                "after": after["scores"][name]["value"],
                "after_stderr": after["scores"][name]["stderr"],
                "better": before["better"],
                "questions": before["questions"],
                "version": before["version"],
                "shots": before["shots"],
            }
            for name, before in self._before["scores"].items()
        }
        return {"edits": edits, "harness": self._before["harness"], "scores": scores}

    def asked(self) -> dict[str, Any]:
        """Everything the figures depend on, as JSON values."""
        files = sorted(self.folder.rglob("*.yaml")) if self.folder is not None else []
        own = [file.read_text(encoding="utf-8") for file in files]
        return {"tasks": list(self.tasks), "limit": self.limit, "own": own}

    def _found(self) -> Any:
        """The harness's list of tasks; its thousands of own tasks are read only if the user's folder lacks one.

        Raises:
            RequestError: there is no such task.
        """
        from lm_eval.tasks import TaskManager

        if self.folder is not None:
            own = TaskManager(include_path=str(self.folder), include_defaults=False)
            if set(self.tasks) <= set(own.all_tasks):
                return own
        found = TaskManager(include_path=None if self.folder is None else str(self.folder))
        missing = [name for name in self.tasks if name not in found.all_tasks]
        if missing:
            raise RequestError(
                f"lm-eval has no task {', '.join(missing)}; `lm-eval ls tasks` lists its tasks, and --lm-eval-tasks "
                "names a folder with your own."
            )
        return found

    def _ask(self, lm: LM, side: str) -> dict[str, Any]:
        """Run the tasks on one model; its answers are added to the rows.

        Raises:
            RequestError: the questions of a task cannot be loaded.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _random_state_restored(), torch.no_grad():
            reader = HFLM(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=BATCH)
            try:
                found = lm_eval.simple_evaluate(
                    model=reader,
                    tasks=list(self.tasks),
                    task_manager=self._manager,
                    limit=self.limit,
                    bootstrap_iters=1000,
                )
            except OSError as error:  # a data set that a hub or a disk does not have
                raise RequestError(f"lm-eval cannot read the questions of its tasks: {error}") from error
        for task, samples in found["samples"].items():
            self.rows += [_row(task, side, sample) for sample in samples]
        version = found["lm_eval_version"]
        harness = {
            "lm_eval": version,
            "limit": self.limit,
            "prompts": "as the tasks give them, no chat template",
        }
        return {"harness": harness, "scores": dict(_scores(found))}


def unmeasured(editor: Editor, single: bool) -> str | None:
    """The reason why the harness is not run; None where it is.

    Args:
        editor: makes the edits.
        single: whether they are made one at a time.
    """
    if single:
        return "not measured: edits one at a time are as many models as facts; use --together or --sequential"
    if editor.no_changes:
        return f"not measured: {editor.no_changes}, and the harness runs the model itself"
    return None


def _scores(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task's metrics, ``task: metric`` or ``task: metric (filter)``."""
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kept}")
            more = found["higher_is_better"].get(task, {}).get(metric)
            questions = found.get("n-samples", {}).get(task, {}).get("effective")
            yield (
                f"{task}: {metric}" + ("" if kept == "none" else f" ({kept})"),
                {
                    "value": finite(float(value)),
                    "stderr": finite(float(error)) if isinstance(error, int | float) else None,
                    "better": 0 if more is None else 1 if more else -1,
                    "questions": questions,
                    "version": found["versions"].get(task),
                    "shots": found["n-shot"].get(task),
                },
            )


def _row(task: str, side: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One question's answer, as JSON values."""
    named = sample.get("metrics", ())
    metrics = {name: sample[name] for name in named if isinstance(sample[name], int | float)}
    asked = {"question": sample["doc_id"], "target": str(sample["target"]), "filter": sample.get("filter")}
    return {"task": task, "side": side, **asked, "answers": str(sample["filtered_resps"]), **metrics}


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the state of every random generator afterwards, since the harness seeds them."""
    plain, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the harness seeds this one
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numbers)  # noqa: NPY002
