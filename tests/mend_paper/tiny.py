"""A tiny task, where it comes from, and a cell over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from reproduction.mend_paper.cells import Cell
from reproduction.mend_paper.sources import Bench
from reproduction.mend_paper.tasks import Task

from cases import build_lm, records
from emendo.data import Record
from emendo.models.lm import LM

PROSE = (
    "The capital of Bade is Paris and the main city of Foka is called Rome.",
    "Two and two are four, and the capital of Lima is Old Town; Oslo is another.",
)
TRAINING = {"steps": 4, "batch": 2, "warmup": 1, "validate_every": 2}
SETTINGS = {"rank": 2}


def task(name: str = "tiny", model: str = "tiny", *, prose: bool = False) -> Task:
    facts = records(16)
    texts = PROSE if prose else ()
    return Task(
        name, model, "qa", tuple(facts[:8]), tuple(facts[8:12]), tuple(facts[12:]), "made up", texts, texts
    )


@dataclass
class Tiny:
    """Hands out tiny tasks and counts how often."""

    loaded: list[str] = field(default_factory=list)

    def bench(self, name: str) -> Bench:
        self.loaded.append(name)
        return Bench(task(name, prose=name == "prose"), _lm())

    def material(self, model: str) -> tuple[str | Path, Sequence[Record]]:
        return model, records(8)


@cache
def _lm() -> LM:
    return build_lm("llama")


def mend(**changes: object) -> Cell:
    """A cell that takes a moment."""
    given = {"task": "tiny", "editor": "mend", "settings": SETTINGS, "training": TRAINING, "facts": 4}
    return Cell(**{**given, **changes})  # type: ignore[arg-type]
