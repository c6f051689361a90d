"""MALMEN: networks like MEND's, whose rows are put together by least squares, so that many facts make one edit.

Tan, Zhang, Fu: "Massive Editing for Large Language Models via Meta Learning", ICLR 2024 (arXiv 2311.04661). For each
matrix, over the token rows of all facts of an edit, with ``u~, delta~`` from the networks::

    d_i = -eta * (u_i . u~_i) * delta~_i                what MEND's own edit would add at the key u_i
    D   = argmin ||K D^T - V||^2 + lambda ||D||^2  =  V^T K (K^T K + lambda I)^-1

``eta`` and ``lambda`` are learned for each matrix. The meta-gradient passes from the losses to ``D`` and then once
through the solve and the networks, as in the paper (:func:`emendo.editors.objective.backward_through`). In training the
number of facts in an edit goes through the divisors of ``--batch`` from step to step, unless ``--together`` is given:
with ``--batch 512`` from 1 to 512. Differences to the paper: statistics are exact (the published ones are biased, and
NaN for a single row); the blocks scale before the clamp, as MEND's; small edits are solved in the space of their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emendo._settings import Settings, setting
from emendo.editors._nets import LowRankBlock
from emendo.editors._normalising import (
    GroupedEditor,
    NormalisingNet,
    statistics_on_setting,
    statistics_setting,
)
from emendo.editors.gradient import in_batches
from emendo.edits.edit import Request
from emendo.least_squares import NormalEquations
from emendo.low_rank import LowRank
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import Site, group_sites
from emendo.models.trunk import Trunk


@dataclass(frozen=True, slots=True)
class MalmenConfig(Settings):
    """The settings of MALMEN; the values in parentheses are those of the paper and its code."""

    rank: int = setting(256, "Rank of `U V` in each block (1920).", least=1)
    blocks: int = setting(2, "Number of residual blocks (2).", least=1, most=64)
    eta: float = setting(1e-4, "Step size of every matrix at the start (1e-6).")
    ridge: float = setting(1.0, "Ridge `lambda` of every matrix at the start (1).", above=0)
    scalar_lr: float = setting(0.01, "Learning rate of `eta` as a multiple of the editor's.")
    norm: bool = setting(True, "Normalise `u` and `delta`.")
    statistics: Literal["train-set", "running"] = statistics_setting()
    statistics_on: int = statistics_on_setting()


class _Network(NormalisingNet):
    """The network of the matrices of one shape."""

    def __init__(self, shape: tuple[int, int], modes: int, config: MalmenConfig) -> None:
        super().__init__(shape, config)
        self.blocks = nn.ModuleList(
            LowRankBlock(sum(shape), config.rank, modes) for _ in range(config.blocks)
        )

    def forward(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """``(u~, delta~)`` for the rows of each matrix, in the order of its mode."""
        rows, sizes = self.normalised(factors)
        for block in self.blocks:
            rows = block(rows, sizes)
        u, delta = rows.split(self.shape, -1)
        return list(zip(u.split(sizes), delta.split(sizes), strict=True))


class Malmen(GroupedEditor):
    """MALMEN; see the module's docstring."""

    name = "malmen"
    Config = MalmenConfig
    config: MalmenConfig
    steps: Tensor

    def __init__(
        self, sites: tuple[Site, ...], config: MalmenConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.members = group_sites(sites, shared=True)
        self.nets = nn.ModuleDict(
            {
                key: _Network(sites[members[0]].shape, len(members), self.config)
                for key, members in self.members.items()
            }
        )
        self.eta = nn.Parameter(torch.full((len(sites),), float(self.config.eta)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))  # a resumed run goes on in turn
        self.log_ridge = nn.Parameter(torch.full((len(sites),), self.config.ridge).log())

    @property
    def networks(self) -> nn.ModuleDict:
        """As in the base class."""
        return self.nets

    def rows(self, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """By site name, ``d [rows, d_out]``."""
        return {
            site.name: -eta * (own.u * u).sum(-1, keepdim=True) * delta
            for site, eta, (own, u, delta) in zip(self.sites, self.eta, self.mapped(factors), strict=True)
        }

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """One solution for each example."""
        values = self.rows(factors)
        changes = {}
        for index, site in enumerate(self.sites):
            own = factors[site.name]
            padded = own.lowrank(values[site.name], own.u)
            right = solved(padded.right, self.log_ridge[index].exp())
            changes[site.name] = LowRank(padded.left, right.to(padded.left))
        return changes

    def grouped(self, factors: Mapping[str, Factors], together: int) -> dict[str, LowRank]:
        """One solution for the rows of every ``together`` consecutive examples."""
        joined = {
            name: Factors(f.u, f.delta, f.owner // together, f.examples // together, f.share)
            for name, f in factors.items()
        }
        changes: dict[str, LowRank] = self(joined)
        return changes

    def facts_in_an_edit(self, episodes: int, together: int) -> int:
        """In training without ``--together``, the divisors of the number of episodes in turn."""
        if together > 1 or not self.training:
            return together
        self.steps += 1
        counts = [count for count in range(1, episodes + 1) if episodes % count == 0]
        return counts[int(self.steps) % len(counts)]

    @torch.no_grad()
    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute the joint solution, in memory that does not grow with the number of requests."""
        texts = self.texts(lm, requests)
        trunk = Trunk(lm.model, self.sites)
        equations: dict[str, NormalEquations] = {}
        with self.evaluating():
            for part in in_batches(texts):
                factors = self.factors(trunk, [texts[place] for place in part])
                for index, (name, values) in enumerate(self.rows(factors).items()):
                    own = factors[name]
                    if name not in equations:
                        ridge = self.log_ridge[index].double().exp() * torch.eye(own.u.shape[1]).to(own.u)
                        equations[name] = NormalEquations(ridge, values.shape[1])
                    equations[name].add(own.u, values)
        dtype = self.eta.dtype
        return {name: LowRank.from_dense(own.change().to(dtype)) for name, own in equations.items()}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The networks and ``lambda`` at ``lr``, ``eta`` at ``scalar_lr * lr``."""
        networks = [p for name, p in self.named_parameters() if name != "eta"]
        return [
            {"params": networks, "lr": lr},
            {"params": [self.eta], "lr": lr * self.config.scalar_lr},
        ]


def solved(keys: Tensor, ridge: Tensor) -> Tensor:
    """``K (K^T K + ridge I)^-1 [..., n, d]`` for rows ``K [..., n, d]``, in float64, in the smaller of both spaces."""
    K = keys.double()
    n, d = K.shape[-2:]
    if n <= d:
        found: Tensor = torch.linalg.solve(K @ K.mT + ridge.double() * torch.eye(n).to(K), K)
        return found
    return torch.linalg.solve(K.mT @ K + ridge.double() * torch.eye(d).to(K), K.mT).mT  # type: ignore[no-any-return]
