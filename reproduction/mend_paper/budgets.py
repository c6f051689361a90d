"""The budget of each editor on each task: training steps, settings, test facts.

``scale`` stretches the budgets. On two processor cores all tables are estimated (:func:`seconds`) to take about two and
a half hours at scale 1, and 80 minutes at scale 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from emendo.errors import RequestError
from emendo.train.presets import METHODS, MODELS, TRAINING, training_of
from reproduction.mend_paper.cells import Cell, Match
from reproduction.mend_paper.memory import Memory

EDITORS = {
    "ft": "FT",
    "ft-kl": "FT+KL",
    "enn": "ENN",
    "ke": "KE",
    "mend": "MEND",
    "meta-curvature": "Meta-curvature",
    "meta-sgd": "Meta-SGD",
    "meta-lstm": "Meta-LSTM",
    "lora": "LoRA",
    "repair": "Repair",
    "k-adapter": "K-Adapter",
    "in-context": "In context",
    "cache": "Cache, eps*",
}
"""The rows of Tables 3 and 4: those of the paper, then ours."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of a task.

    Attributes:
        training: of :class:`emendo.train.TrainConfig`.
        facts: test facts.
        slow: test facts for editors that run a loop of gradient steps for every edit.
    """

    training: Mapping[str, Any]
    facts: int
    slow: int


BUDGETS = {
    "atlas-bert": Budget({"steps": 150, "batch": 8, "near": 1, "sibling": 1}, 100, 40),
    "atlas-bart": Budget({"steps": 300, "batch": 8, "near": 1, "sibling": 1}, 150, 50),
    "atlas-t5": Budget({"steps": 300, "batch": 8, "near": 1, "sibling": 1}, 150, 50),
    "wikitext": Budget({"steps": 60, "batch": 8, "near": 0, "sibling": 0, "text": 2}, 30, 15),
    "counterfact": Budget({"steps": 200, "batch": 8, "near": 1, "sibling": 1}, 60, 20),
    "counterfact-text": Budget({"steps": 200, "batch": 8, "near": 1, "sibling": 1}, 8, 8),
}

PAPER_TASKS = {
    "fever-bert-base": "bert-base",
    "zsre-bart-base": "bart-base",
    "wikitext-distilgpt2": "distilgpt2",
    "wikitext-gpt-neo-2.7b": "gpt-neo-2.7b",
    "wikitext-gpt-j-6b": "gpt-j-6b",
    "zsre-t5-xl": "t5-xl",
    "zsre-t5-xxl": "t5-xxl",
}
"""The tasks of the paper itself, each with its model's name in :data:`emendo.train.presets.MODELS`."""
BUDGETS |= {task: Budget(TRAINING, 500, 500) for task in PAPER_TASKS}

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "No sharing": {"shared": False},
    "Running statistics": {"statistics": "running"},
    "No norm": {"norm": False},
    "No ID init": {"identity": False},
    "Only u": {"factors": "u"},
    "Only delta": {"factors": "delta"},
    "Only smaller": {"factors": "smaller"},
    "MEND": {},
}
"""The rows of Table 6."""
UNCLAIMED = ("MEND", "No sharing", "Running statistics")
"""The rows that the paper does not put below MEND."""

LEARNING: Mapping[str, Mapping[str, Any]] = {
    "enn": {"lr": 3e-4},
    "ke": {"lr": 5e-3},
    "meta-lstm": {"lr": 1e-2, "steps": 100, "batch": 2},
}
"""Training settings of a method that differ from the defaults (docs/log.md)."""

SETTINGS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("wikitext", "enn"): {"trains": "suffix"},
    ("counterfact", "enn"): {"trains": "suffix"},
    **{(task, "meta-lstm"): {"hidden": 4} for task in ("atlas-bert", "atlas-bart", "atlas-t5")},
    ("wikitext", "cache"): {"lookup": "token", "logit": 1.0},
}
"""Settings of a method on a task."""

SLOW = (
    "ft",
    "ft-kl",
    "lora",
    "meta-lstm",
    "repair",
    "k-adapter",
    "ft-constrained",
    "ft-penalised",
    "diff-pruning",
    "ewc",
)
"""Editors that run a loop of gradient steps for every edit."""

REFUSES = {("atlas-bert", "in-context"), ("wikitext", "meta-lstm"), ("counterfact", "meta-lstm")}
"""Methods that cannot do a task: a classifier has not learnt to read a fact before its claim, and a network that runs
for each of SmolLM2's 8 million edited weights takes hours to train."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The requested part of the tables, and its scale.

    Attributes:
        tasks: only these; empty for all.
        editors: only these; empty for all.
        scale: of training steps and test facts.
        seed: of every cell.
        dtype: of every model.
        minutes: longest training of an editor; None sets no limit.
        known: the budget of each task.
    """

    tasks: tuple[str, ...] = ()
    editors: tuple[str, ...] = ()
    scale: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    minutes: float | None = None
    known: Mapping[str, Budget] = field(default_factory=lambda: BUDGETS)

    def __post_init__(self) -> None:
        named = dict.fromkeys((*EDITORS, *SLOW))
        for what, asked, allowed in (("task", self.tasks, self.known), ("editor", self.editors, named)):
            if strange := [name for name in asked if name not in allowed]:
                raise RequestError(
                    f"There is no {what} {strange[0]!r} here; there are: {', '.join(allowed)}."
                )
        if not self.scale > 0:
            raise RequestError(f"--scale must be above 0, not {self.scale}.")

    def wants(self, task: str, editor: str) -> bool:
        """Whether a cell is requested and possible."""
        if (task, editor) in REFUSES or (task in PAPER_TASKS and editor not in _of_the_paper(task)):
            return False
        return (not self.tasks or task in self.tasks) and (not self.editors or editor in self.editors)

    def cell(self, task: str, editor: str, **changes: Any) -> Cell:
        """A cell within its budget."""
        budget, slow = self.known[task], editor in SLOW
        own, changed = PAPER_TASKS.get(task), changes.pop("training", {})
        training = {**budget.training, **({} if own else LEARNING.get(editor, {}))}
        if own and editor in METHODS:
            training |= training_of(editor, own)
        training |= changed
        steps = self._scaled(training["steps"])
        every = min(TRAINING["validate_every"] if own else steps, max(1, steps // 5))
        training |= {"steps": steps, "warmup": 0 if own else min(100, steps // 5), "validate_every": every}
        training |= {"minutes": self.minutes} if self.minutes is not None else {}
        return Cell(
            task,
            editor,
            {
                **(_paper_settings(own, editor) if own else SETTINGS.get((task, editor), {})),
                **changes.pop("settings", {}),
            },
            sites=changes.pop("sites", MODELS[own].sites if own else "mlp"),
            training=training,
            facts=self._scaled(changes.pop("facts", budget.slow if slow else budget.facts)),
            seed=self.seed,
            dtype=MODELS[own].dtype if own else self.dtype,
            match=Match(self.cell(task, "mend"), changes.pop("times", 1.0)) if editor == "cache" else None,
            **changes,
        )

    def together(self, task: str, editor: str, k: int) -> Cell:
        """A cell of k facts in an edit, with at least one edit a step and two to measure; more facts, fewer steps."""
        if k == 1:
            return self.cell(task, editor)
        training = self.known[task].training
        batch = max(k, training["batch"] // k * k)
        steps = round(training["steps"] * (training["batch"] / batch) ** 0.9)
        facts = max(2 * k, self.known[task].facts // k * k)
        cell = self.cell(task, editor, k=k, training={"batch": batch, "steps": steps}, facts=facts)
        return cell if self.scale >= 1 else replace(cell, facts=max(k, cell.facts // k * k))

    def _scaled(self, count: int) -> int:
        return max(1, round(count * self.scale))


def _of_the_paper(task: str) -> tuple[str, ...]:
    """The editors that the paper runs on its own task."""
    return ("ft", "ft-kl", "cache", *MODELS[PAPER_TASKS[task]].methods)


def _paper_settings(model: str, editor: str) -> Mapping[str, Any]:
    """The paper's settings of an editor on its own model."""
    own = MODELS[model]
    if editor in METHODS:
        return METHODS[editor].settings
    if editor == "cache":
        return {"lookup": "token", "logit": 1.0} if own.task == "generation" else {}
    return {"lr": own.ft_lr, **({"c_edit": own.ft_kl_c_edit} if editor == "ft-kl" else {})}


SECONDS: Mapping[str, tuple[float, float, float]] = {
    "atlas-bert": (0.08, 0.1, 1.0),
    "atlas-bart": (0.025, 0.07, 0.7),
    "atlas-t5": (0.03, 0.06, 0.7),
    "wikitext": (0.3, 1.5, 2.5),
    "counterfact": (0.05, 0.3, 1.5),
    "counterfact-text": (0.05, 0.5, 1.5),
}
"""Seconds for a training fact, a test fact and an edit that is a loop of steps, on two processor cores. Measured on
single cells, to within a factor of about two; testing counterfact, and the loops there and on atlas-t5, are guesses."""

SLOWER = {"enn": 4.0, "meta-lstm": 100.0}
"""The factor by which a training fact takes longer for a method."""

RADIUS = 12.0
"""The factor by which a cache takes longer if its radius must be found first."""


def seconds(cell: Cell | Memory) -> float:
    """The estimated time of a cell on two processor cores; 0 for the paper's own models, which is no estimate."""
    if isinstance(cell, Memory):
        return 15.0
    if cell.task in PAPER_TASKS:
        return 0.0
    learn, test, loop = SECONDS.get(cell.task, SECONDS["atlas-bart"])
    config = cell.train_config() if cell.trained else None
    training = config.steps * config.batch * learn * SLOWER.get(cell.editor, 1.0) if config else 0.0
    if config and config.minutes is not None:
        training = min(training, 60 * config.minutes)
    search = RADIUS if cell.match and cell.match.times == 1 else 1.0
    return training + cell.facts * (test * search + (loop if cell.editor in SLOW else 0.0))
