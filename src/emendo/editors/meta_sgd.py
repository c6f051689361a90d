"""Meta-SGD: a learned step size for every weight.

Li, Zhou, Chen, Li: "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017 (arXiv 1707.09835). With
``G = sum_i delta_i u_i^T`` the gradient of a matrix, and learned step sizes ``A [d_out, d_in]``::

    dW = -A * G        elementwise

All of ``A`` starts as ``alpha``, so it starts as one plain step. Here the weights that the step starts from are frozen;
the paper learns them too.

The elementwise product has full rank, so its edits are dense. A training step holds a dense change and its gradient for
every matrix, edit and outer text, and a stored edit has ``d_out * d_in`` numbers for every matrix: the method is for
small models and small batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from emendo._settings import Settings, setting
from emendo.editors._normalising import (
    NormalisingEditor,
    NormalisingNet,
    statistics_on_setting,
    statistics_setting,
)
from emendo.edits.edit import Request
from emendo.low_rank import LowRank
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class MetaSgdConfig(Settings):
    """The settings of Meta-SGD."""

    alpha: float = setting(1e-4, "Step size of every weight at the start; about 0.003 without `norm`.")
    alpha_lr: float = setting(0.01, "Learning rate of the step sizes as a multiple of the editor's.", above=0)
    norm: bool = setting(True, "Normalise `u` and `delta`, as MEND does; the paper does not.")
    statistics: Literal["train-set", "running"] = statistics_setting()
    statistics_on: int = statistics_on_setting()


class _Steps(NormalisingNet):
    """The step sizes of one edited matrix."""

    def __init__(self, site: Site, config: MetaSgdConfig) -> None:
        super().__init__(site.shape, config)
        self.alpha = nn.Parameter(torch.full((site.d_out, site.d_in), float(config.alpha)))

    def forward(self, rows: Factors) -> LowRank:
        """The changes ``[examples, d_out, d_in]`` of all examples."""
        u, delta = self.normalised([rows])[0].split(self.shape, -1)
        return LowRank.from_dense(-self.alpha * rows.lowrank(delta, u).dense())


class MetaSgd(NormalisingEditor):
    """The Meta-SGD editor; the module's docstring has its equation."""

    name = "meta-sgd"
    Config = MetaSgdConfig
    config: MetaSgdConfig

    def __init__(
        self, sites: tuple[Site, ...], config: MetaSgdConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.steps = nn.ModuleList(_Steps(site, self.config) for site in sites)

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """Multiply the gradient of each example by the step sizes."""
        return {
            site.name: steps(factors[site.name]) for site, steps in zip(self.sites, self.steps, strict=True)
        }

    def nets_of_sites(self) -> Iterator[tuple[NormalisingNet, list[str]]]:
        """Each matrix's step sizes with its site."""
        for site, steps in zip(self.sites, self.steps, strict=True):
            assert isinstance(steps, NormalisingNet)
            yield steps, [site.name]

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The sum of all requests' own changes, as one dense change."""
        each = self.each(lm, requests)
        return {name: LowRank.from_dense(change.dense().sum(0)) for name, change in each.items()}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The step sizes at ``alpha_lr * lr``."""
        return [{"params": list(self.parameters()), "lr": lr * self.config.alpha_lr}]
