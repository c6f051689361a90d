"""Facts held out: what the best editor is chosen by."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict

from emendo.data import Record
from emendo.models import LM
from emendo.outer import Episode, Outcome
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes

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
