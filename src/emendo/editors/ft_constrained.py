"""Constrained fine-tuning: the change must stay small, by one of three norms, or sparse.

Zhu, Rawat, Zaheer, Bhojanapalli, Li, Yu, Kumar: "Modifying Memories in Transformer Models", 2020 (arXiv 2012.00363)::

    minimise over D  NLL(targets | W + D)   subject to  ||D|| <= radius

by projected gradient descent. The settings are those of the reference implementation in Meng, Bau, Andonian, Belinkov:
"Locating and Editing Factual Associations in GPT", NeurIPS 2022 (kmeng01/rome, ``baselines/ft``): Adam, 25 steps, the
L-inf norm with radius 5e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from emendo._settings import Settings, setting
from emendo.editors.descent import Adam, Descent, DescentEditor
from emendo.models.lm import LM

_RADII = {"linf": 5e-4, "l2": 1e-2, "l0": 1e-2}


@dataclass(frozen=True, slots=True)
class ConstrainedConfig(Settings):
    """The settings of constrained fine-tuning."""

    norm: Literal["linf", "l2", "l0"] = setting(
        "linf",
        "Norm of each matrix's change that is bounded: largest entry, Frobenius norm, or number of nonzero entries.",
    )
    radius: float | None = setting(
        None,
        "The bound: for `linf` absolute, for `l2` a multiple of the weight's norm, for `l0` a share of its entries.",
        above=0,
        unset="5e-4, 1e-2, 1e-2",
    )
    steps: int = setting(25, "Largest number of steps of an edit.", least=1)
    lr: float = setting(5e-4, "Learning rate of Adam.", above=0)
    until: float | None = setting(
        1e-2,
        "Stop once the NLL per target token is below this; none: once every target token is the argmax.",
        above=0,
    )


class ConstrainedFineTuning(DescentEditor):
    """Constrained fine-tuning; see the module's docstring."""

    name = "ft-constrained"
    Config = ConstrainedConfig
    config: ConstrainedConfig

    def descent(self, lm: LM) -> Descent:
        """The settings of the search on this model."""
        return Descent(
            optimizer=Adam(self.config.lr),
            steps=self.config.steps,
            project={site.name: self._projection(site.weight(lm.model)) for site in self.sites},
            until=self.config.until,
        )

    def _projection(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The projection of a weight's change onto the allowed set."""
        radius = self.config.radius or _RADII[self.config.norm]
        match self.config.norm:
            case "linf":
                return partial(project_linf, radius=radius)
            case "l2":
                return partial(project_l2, radius=radius * float(weight.double().norm()))
            case "l0":
                return partial(project_l0, count=math.ceil(radius * weight.numel()))


def project_linf(change: Tensor, radius: float) -> Tensor:
    """The nearest change whose entries are at most ``radius`` in size."""
    return change.clamp(-radius, radius)


def project_l2(change: Tensor, radius: float) -> Tensor:
    """The nearest change whose Frobenius norm is at most ``radius``."""
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    return change if norm <= radius else change * (radius / norm)


def project_l0(change: Tensor, count: int) -> Tensor:
    """The nearest change with at most ``count`` nonzero entries: the largest ones."""
    flat = change.flatten()
    kept = flat.abs().topk(min(count, len(flat))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)
