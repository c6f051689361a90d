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

from emendo.editors.descent import Adam, Descent, DescentEditor, check_settings
from emendo.errors import RequestError
from emendo.models.lm import LM

_RADII = {"linf": 5e-4, "l2": 1e-2, "l0": 1e-2}


@dataclass(frozen=True, slots=True)
class ConstrainedConfig:
    """The settings of constrained fine-tuning.

    Attributes:
        norm: what is bounded, at each site: ``"linf"``, the largest entry of the change; ``"l2"``, its Frobenius norm;
            ``"l0"``, how many of its entries are not zero.
        radius: the bound: for ``"linf"`` as it is (5e-4 by default), for ``"l2"`` as a multiple of the weight's own
            norm (1e-2), for ``"l0"`` as a share of the weight's entries (1e-2).
        steps: the most steps of an edit.
        lr: learning rate of Adam.
        until: stop once the NLL, in nats per target token, is below this; None: once every target token is the argmax.
    """

    norm: Literal["linf", "l2", "l0"] = "linf"
    radius: float | None = None
    steps: int = 25
    lr: float = 5e-4
    until: float | None = 1e-2

    def __post_init__(self) -> None:
        check_settings(self.steps, self.lr)
        if self.norm not in _RADII:
            raise RequestError(f"norm={self.norm!r} is not one of {', '.join(_RADII)}.")
        for name, value in (("radius", self.radius), ("until", self.until)):
            if value is not None and not value > 0:
                raise RequestError(f"{name} must be above 0, not {value}.")


class ConstrainedFineTuning(DescentEditor):
    """Constrained fine-tuning; see the module's text."""

    name = "ft-constrained"
    Config = ConstrainedConfig
    config: ConstrainedConfig

    def descent(self, lm: LM) -> Descent:
        """How a change of this model is searched for."""
        return Descent(
            optimizer=Adam(self.config.lr),
            steps=self.config.steps,
            project={site.name: self._projection(site.weight(lm.model)) for site in self.sites},
            until=self.config.until,
        )

    def _projection(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """What puts the change of a weight back where it may be."""
        radius = self.config.radius or _RADII[self.config.norm]
        match self.config.norm:
            case "linf":
                return partial(project_linf, radius=radius)
            case "l2":
                return partial(project_l2, radius=radius * float(weight.double().norm()))
            case "l0":
                return partial(project_l0, count=math.ceil(radius * weight.numel()))


def project_linf(change: Tensor, radius: float) -> Tensor:
    """The nearest change with no entry beyond ``radius``."""
    return change.clamp(-radius, radius)


def project_l2(change: Tensor, radius: float) -> Tensor:
    """The nearest change whose Frobenius norm is at most ``radius``."""
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    return change if norm <= radius else change * (radius / norm)


def project_l0(change: Tensor, count: int) -> Tensor:
    """The nearest change with at most ``count`` entries that are not zero: the largest ones are kept."""
    flat = change.flatten()
    kept = flat.abs().topk(min(count, len(flat))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)
