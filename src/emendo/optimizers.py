"""The optimisers of changes, and the settings that come with them.

A rule moves any part of a matrix as it would move the whole, so a gradient that comes as factors is formed block by
block, where it is used, and never held as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from emendo.errors import RequestError
from emendo.lowrank import LowRank
from emendo.models import LM

_BLOCK = 1 << 16  # entries that are moved at one time, so that they stay in a processor's cache


@dataclass(frozen=True, slots=True)
class RmsProp:
    """RMSprop, as ``torch.optim.RMSprop``; its first step moves every entry by ``10 * lr``."""

    lr: float
    decay: float = 0.99
    eps: float = 1e-8
    moments: ClassVar[int] = 1

    def move(self, weights: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: int) -> None:
        """Move ``weights`` in place, at the step of this number, counted from 1."""
        (square,) = moments
        square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        weights.addcdiv_(gradient, square.sqrt().add_(self.eps), value=-self.lr)


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam, as ``torch.optim.Adam``."""

    lr: float
    decay: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    moments: ClassVar[int] = 2

    def move(self, weights: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: int) -> None:
        """Move ``weights`` in place, at the step of this number, counted from 1."""
        mean, square = moments
        first, second = self.decay
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square.sqrt().div_(math.sqrt(1 - second**step)).add_(self.eps)
        weights.addcdiv_(mean, root, value=-self.lr / (1 - first**step))


Optimizer = RmsProp | Adam

OPTIMIZERS: Mapping[str, type[Optimizer]] = {"rmsprop": RmsProp, "adam": Adam}
"""Name -> rule."""


def move(
    optimizer: Optimizer, weights: Tensor, gradient: LowRank, moments: Sequence[Tensor], step: int
) -> None:
    """Move ``weights [n, m]`` in place by a gradient that comes as factors.

    Args:
        optimizer: the rule.
        weights: what is moved.
        gradient: its gradient.
        moments: what the rule remembers, ``optimizer.moments`` tensors like ``weights`` that were zero at the start.
        step: the number of this step, counted from 1.
    """
    height = max(1, _BLOCK // weights.shape[1]) if weights.device.type == "cpu" else len(weights)
    for at in range(0, len(weights), height):
        rows = slice(at, at + height)
        block = gradient.left[rows] @ gradient.right
        optimizer.move(weights[rows], block, [moment[rows] for moment in moments], step)


def usual_rate(lm: LM) -> float:
    """A learning rate of RMSprop that suits fine-tuning on single edits.

    From 2e9 parameters on it is the paper's (MEND, C.1): 5e-6, or 1e-4 for an encoder-decoder. Below that it is 3e-5
    for all. There the paper has 1e-6, with which 1 of 8 edits of SmolLM2-135M succeeded within 100 steps; with 3e-5 all
    did, in 3.5 steps on average, and so did all of three small models (T5, BART, BERT), in 5 to 12.
    """
    if lm.model.num_parameters() < 2e9:
        return 3e-5
    return 1e-4 if lm.kind == "seq2seq" else 5e-6


def check_settings(steps: int, lr: float | None, optimizer: str = "adam") -> None:
    """Refuse settings that no search can have.

    Raises:
        RequestError: no step at all, a learning rate that is not above 0, or an optimiser that is not there.
    """
    if steps < 1:
        raise RequestError(f"steps must be at least 1, not {steps}.")
    if lr is not None and not lr > 0:
        raise RequestError(f"lr must be above 0, not {lr}.")
    if optimizer not in OPTIMIZERS:
        raise RequestError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}.")
