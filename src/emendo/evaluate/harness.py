"""Tasks of the evaluation harness (EleutherAI's lm-eval), asked of the clean model and of the model with its edits.

A task takes as long as a model takes to answer all of its questions, so it is asked of one edited model only: the one
with all edits of a sequence, or the one with the first edit of several facts. Edits one at a time are as many models as
there are facts, and are not measured. The harness reads the model itself, with the change of weights attached beside
them, so that its figures are those which it gives for an exported edit. The only place with lm_eval.
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

from emendo.editors.base import Editor
from emendo.errors import RequestError
from emendo.evaluate.results import finite
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM

BATCH = 8
"""Questions that the harness asks at once."""


@dataclass(eq=False)
class Harness:
    """What to ask.

    Attributes:
        tasks: names of the harness's tasks, groups of tasks or tags.
        limit: the first so many questions of each task; None takes all.
        folder: a folder with task files (YAML) of one's own, beside the harness's.
        rows: after :meth:`compare`, what was answered to every question, before and after.

    Raises:
        RequestError: no task, a limit or a folder that makes no sense, or the harness is not installed.
    """

    tasks: Sequence[str]
    limit: int | None = None
    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise RequestError(f"lm-eval: {','.join(self.tasks)!r} names no task; give one or several: a,b.")
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"lm-eval: limit={self.limit}: give a whole number from 1 up.")
        if self.folder is not None and not self.folder.is_dir():
            raise RequestError(f"lm-eval: {self.folder} is no folder of task files.")
        if find_spec("lm_eval") is None:
            raise RequestError(
                "Tasks of the evaluation harness need lm-eval: pip install 'emendo[lm-eval]', or leave --lm-eval out."
            )

    def begin(self, lm: LM) -> None:
        """Find the tasks and ask them of the clean model.

        Args:
            lm: the clean model, a decoder or an encoder-decoder.

        Raises:
            RequestError: there is no such task, its questions cannot be had, or the model is a classifier.
        """
        if lm.kind == "classifier":
            raise RequestError(f"lm-eval: {lm.name} is a classifier, of which the harness can ask nothing.")
        self.rows = []
        self._manager = self._found()
        self._before = self._ask(lm, "before")

    def compare(self, host: LM, changes: Mapping[str, LowRank], edits: str) -> dict[str, Any]:
        """Ask the same of the model with its edits.

        Args:
            host: the model that the changes belong to.
            changes: by site name, ``[d_out, r]`` and ``[r, d_in]``.
            edits: which edits these are, in words.

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
        """What the figures depend on, as JSON values."""
        files = sorted(self.folder.rglob("*.yaml")) if self.folder is not None else []
        own = [file.read_text(encoding="utf-8") for file in files]
        return {"tasks": list(self.tasks), "limit": self.limit, "own": own}

    def _found(self) -> Any:
        """The harness's list of tasks; its own thousands are only read where the user's folder has not all.

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
                f"lm-eval has no task {', '.join(missing)}; lm-eval ls tasks lists what it has, and --lm-eval-tasks "
                "names a folder of your own."
            )
        return found

    def _ask(self, lm: LM, side: str) -> dict[str, Any]:
        """One model's figures, and its answers into the rows.

        Raises:
            RequestError: the questions of a task cannot be had.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _same_dice(), torch.no_grad():
            reader = HFLM(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=BATCH)
            try:
                found = lm_eval.simple_evaluate(
                    model=reader,
                    tasks=list(self.tasks),
                    task_manager=self._manager,
                    limit=self.limit,
                    bootstrap_iters=1000,
                )
            except OSError as error:  # what it is that a hub or a disk does not give
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
    """Why the harness is not asked; None where it is.

    Args:
        editor: makes the edits.
        single: whether they are made one at a time.
    """
    if single:
        return "not measured: edits one at a time are as many models as facts; use --together or --sequential"
    if not editor.makes.changes_weights:
        return f"not measured: {editor.name} changes no weights, and the harness reads the model itself"
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
def _same_dice() -> Iterator[None]:
    """The harness seeds every generator of random numbers; they go on afterwards as if it had not."""
    plain, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that the harness seeds
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numbers)  # noqa: NPY002
