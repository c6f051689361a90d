"""Meta-curvature: learned matrices on both sides of the fine-tuning gradient.

Park, Oliva: "Meta-Curvature", NeurIPS 2019 (arXiv 1902.03356), for a matrix, where the mode of the filters is absent.
With ``G = sum_i delta_i u_i^T``::

    dW = -alpha * M_out G M_in^T = -alpha * sum_i (M_out delta_i) (M_in u_i)^T

``M_out`` and ``M_in`` start as the identity, so it starts as one plain step. It is MEND with a linear map of each
factor in place of its networks, and as cheap to apply: the rank stays the number of rows.

Where it departs from the paper:

1. One inner step on frozen weights; the paper also learns the weights that the step starts from.
2. ``alpha`` is learned, one for each matrix, as in MEND.
3. By default the factors are normalised and the matrices of one shape share ``M_out`` and ``M_in``, both as in MEND, so
   that the two differ in the map alone. ``norm=False, shared=False`` is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emendo._settings import Settings, setting
from emendo.editors._normalising import (
    GroupedEditor,
    NormalisingNet,
    statistics_on_setting,
    statistics_setting,
)
from emendo.low_rank import LowRank
from emendo.models.capture import Factors
from emendo.models.sites import Site, group_sites


@dataclass(frozen=True, slots=True)
class MetaCurvatureConfig(Settings):
    """The settings of meta-curvature."""

    alpha: float = setting(1e-4, "Step size of every matrix at the start; about 0.003 without `norm`.")
    alpha_lr: float = setting(0.01, "Learning rate of `alpha` as a multiple of the editor's.", least=0)
    norm: bool = setting(True, "Normalise `u` and `delta`.")
    statistics: Literal["train-set", "running"] = statistics_setting()
    statistics_on: int = statistics_on_setting()
    shared: bool = setting(True, "One pair of matrices for each shape; otherwise one for each edited matrix.")


class _Curvature(NormalisingNet):
    """The two matrices of the edited matrices that share one shape."""

    def __init__(self, shape: tuple[int, int], config: MetaCurvatureConfig) -> None:
        super().__init__(shape, config)
        d_in, d_out = shape
        self.m_in = nn.Parameter(torch.eye(d_in))
        self.m_out = nn.Parameter(torch.eye(d_out))

    def forward(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """``(M_in u, M_out delta)`` for the rows of each edited matrix."""
        rows, sizes = self.normalised(factors)
        u, delta = rows.split([len(self.m_in), len(self.m_out)], -1)
        mapped = (u @ self.m_in.T).split(sizes), (delta @ self.m_out.T).split(sizes)
        return list(zip(*mapped, strict=True))


class MetaCurvature(GroupedEditor):
    """The meta-curvature editor; the module's docstring has its equation."""

    name = "meta-curvature"
    Config = MetaCurvatureConfig
    config: MetaCurvatureConfig

    def __init__(
        self, sites: tuple[Site, ...], config: MetaCurvatureConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.members = group_sites(sites, shared=self.config.shared)
        self.curvature = nn.ModuleDict(
            {key: _Curvature(sites[members[0]].shape, self.config) for key, members in self.members.items()}
        )
        self.alpha = nn.Parameter(torch.full((len(sites),), float(self.config.alpha)))

    @property
    def networks(self) -> nn.ModuleDict:
        """As in the base class."""
        return self.curvature

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """Map every row and add up the rows of each example."""
        return {
            site.name: own.lowrank(-alpha * delta, u)
            for site, alpha, (own, u, delta) in zip(self.sites, self.alpha, self.mapped(factors), strict=True)
        }

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The matrices at ``lr``, ``alpha`` at ``alpha_lr * lr``."""
        return [
            {"params": list(self.curvature.parameters()), "lr": lr},
            {"params": [self.alpha], "lr": lr * self.config.alpha_lr},
        ]
