"""Proximal operators of penalties in the metric of an optimiser's step, and the settings of penalised methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emendo._settings import Settings, setting

_SAMPLED = 64  # of how many entries one is in the sample
_STEPS = 100  # of Newton's method, far more than it takes


@dataclass(frozen=True, slots=True)
class PenalisedSettings(Settings):
    """The settings that the penalised methods share."""

    steps: int = setting(25, "Largest number of steps of an edit.", least=1)
    lr: float = setting(5e-4, "Learning rate of Adam.", above=0)
    until: float | None = setting(
        1e-2,
        "Stop once the NLL per target token is below this; none: once every target token is the argmax.",
        above=0,
    )


def proximal_l2(change: Tensor, metric: Tensor, weight: float | Tensor) -> Tensor:
    """The ``x`` that minimises ``sum(weight * x^2) / 2 + sum(metric * (x - change)^2) / 2``."""
    return change * metric / (metric + weight)


def proximal_linf(change: Tensor, metric: Tensor, weight: float) -> Tensor:
    """The ``x`` that minimises ``weight * max |x| + sum(metric * (x - change)^2) / 2``.

    It is ``change`` cut off at the height ``t`` where ``sum(metric * max(0, |change| - t)) = weight``; 0 where there is
    none. A sample of the entries gives the first guess.
    """
    size, slope = change.abs().flatten(), metric.flatten()
    guess = _height(size[::_SAMPLED], slope[::_SAMPLED], weight / _SAMPLED, 0.0)
    height = _height(size, slope, weight, guess)
    return change.clamp(-height, height)


def _height(size: Tensor, slope: Tensor, weight: float, height: float) -> float:
    """The ``t`` where ``sum(slope * max(0, size - t)) = weight``, but at least 0, by Newton's method.

    The sum is convex and piecewise linear, so that a finite number of steps leads to ``t`` from any start below the
    largest ``size``.
    """
    accuracy = 4 * torch.finfo(size.dtype).eps
    for _ in range(_STEPS):
        over = (size - height).clamp_(min=0)
        excess = float(slope.dot(over)) - weight
        reached = max(0.0, height + excess / float(slope.dot(over.sign_()).clamp(min=1e-300)))
        if abs(reached - height) <= accuracy * reached:
            break
        height = reached
    return reached
