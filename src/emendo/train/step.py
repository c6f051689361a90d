"""One training step, one validation step, and the figures that the best editor is chosen by.

For a batch of B episodes the editor makes B separate edits (or one for every ``together`` of them), each with losses on
its own texts: see :mod:`emendo.editors.objective`, and :meth:`emendo.editors.gradient.GradientEditor.outer_step`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields

import torch
from torch import nn

from emendo.data import Record
from emendo.editors.gradient import Ahead, GradientEditor
from emendo.editors.objective import Episode, Outcome, Weights
from emendo.models.lm import LM
from emendo.models.trunk_cache import TrunkCache
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes
from emendo.train.processes import World

_NAMES = tuple(field.name for field in fields(Outcome))
MARGIN = 0.02
"""Scores on a hundred facts that differ by less count as equal; of equal editors the later one is kept."""


def training_step(
    editor: GradientEditor,
    store: TrunkCache,
    episodes: Sequence[Episode],
    weights: Weights,
    ahead: Ahead | None = None,
    together: int = 1,
) -> Outcome | None:
    """Add the gradient of the mean loss of a batch of episodes to the editor's parameters.

    Args:
        editor: in training mode; its running statistics are updated.
        store: holds the trunk's output of every text of the episodes.
        episodes: the batch.
        weights: of the losses.
        ahead: the batch's part of the result of ``editor.look_ahead``, if it was called before.
        together: number of consecutive episodes that make one edit.

    Returns:
        Losses and scores, or None where a factor, a loss or a gradient is not finite. Then the parameters' gradients
        must not be used; the running statistics have not seen the batch if a factor was not finite.
    """
    if ahead is None:
        (ahead,) = editor.look_ahead(store, [episodes])
    outcome = editor.outer_step(store, episodes, ahead, weights, together=together, backward=True)
    return outcome if outcome is not None and math.isfinite(outcome.loss) else None


@torch.no_grad()
def validation_step(
    editor: GradientEditor,
    store: TrunkCache,
    episodes: Sequence[Episode],
    weights: Weights,
    together: int = 1,
) -> Outcome | None:
    """Compute the same losses and scores in eval mode, without gradients and without updating any statistics."""
    with editor.evaluating():
        (ahead,) = editor.look_ahead(store, [episodes])
        return editor.outer_step(store, episodes, ahead, weights, together=together)


def joint_outcome(world: World, outcome: Outcome | None, episodes: Sequence[Episode]) -> Outcome | None:
    """The outcome of a batch from those of its shares; None where any process has none.

    Args:
        world: the processes.
        outcome: of this process's share.
        episodes: this process's share.
    """
    if world.size == 1:
        return outcome
    texts, names = sum(len(episode.locality) for episode in episodes), _NAMES
    counts = [texts if name.startswith("locality") else len(episodes) for name in names]
    values = [0.0] * len(names) if outcome is None else list(asdict(outcome).values())
    sums = [value * count for value, count in zip(values, counts, strict=True)]
    own = torch.tensor([float(outcome is None), *counts, *sums], dtype=torch.float64)
    total = world.gather(own).sum(0).tolist()
    if total[0]:
        return None
    counts, sums = total[1 : 1 + len(names)], total[1 + len(names) :]
    return Outcome(**{name: s / c for name, s, c in zip(names, sums, counts, strict=True)})


def joint_mean(world: World, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The mean of the outcomes of all processes; None where there are none."""
    rows = [list(asdict(outcome).values()) for outcome in outcomes]
    sums = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * len(_NAMES)
    count, *total = world.gather(torch.tensor([len(rows), *sums], dtype=torch.float64)).sum(0).tolist()
    return Outcome(**{name: s / count for name, s in zip(_NAMES, total, strict=True)}) if count else None


def sum_gradients(world: World, parameters: Sequence[nn.Parameter], share: float) -> None:
    """Replace the gradient of the mean loss of this process's share by that of the whole batch.

    Args:
        world: the processes.
        parameters: the editor's, in the same order in every process.
        share: the episodes of this process as a share of the batch.
    """
    if world.size == 1:
        return
    own = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    anywhere = world.gather(own).sum(0).tolist()
    gradients = []
    for parameter, used in zip(parameters, anywhere, strict=True):
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad.mul_(share))
    world.add(gradients)


def held_out(
    lm: LM, records: Sequence[Record], config: TrainConfig, passages: Sequence[str] = (), base: int = 0
) -> list[list[Episode]]:
    """The episodes of the first ``validate_on`` records, in batches; empty if they are too few for one edit.

    Passages are the source of training sequences (``base``) alone; the locality texts are the records' own.
    """
    records = records[: config.validate_on]
    size = min(config.batch, len(records) // config.together * config.together)
    if not size:
        return []
    plain = TrainConfig(
        batch=size, together=config.together, near=max(1, config.near), sibling=0, text=0, seed=config.seed
    )
    episodes = Episodes(lm, records, plain, passages, base)
    return [episodes.batch(step) for step in range(math.ceil(len(records) / size))]


def harmonic_mean(*values: float) -> float:
    """The harmonic mean: the score that the best editor is chosen by. It is low if any one of its values is low.

    The loss would be a worse criterion: a few locality texts whose answer flips dominate its mean KL (docs/log.md).
    """
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def mean(outcomes: Collection[Outcome]) -> Outcome:
    """The mean of each figure."""
    rows = [asdict(outcome) for outcome in outcomes]
    return Outcome(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def figures(outcome: Outcome) -> dict[str, float]:
    """An outcome with the short names of reports."""
    short = {"edit_loss": "edit", "locality_loss": "KL"}
    return {short.get(name, name): value for name, value in asdict(outcome).items()}
