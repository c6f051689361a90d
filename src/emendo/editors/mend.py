"""MEND: small networks turn the factors of the fine-tuning gradient into an edit.

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), Eq. 2 and 3.
For each matrix and each token row ``i`` with input ``u_i`` and output gradient ``delta_i``::

    z   = concat(normalise(u_i), normalise(delta_i))
    h   = z + clamp(s1 * (U1 V1 z + b1) + o1, min=0)                        (3a)
    g   = h + clamp(s2 * (U2 V2 h + b2) + o2, min=0)                        (3b)
    u~_i, delta~_i = split(g)
    dW  = -alpha * sum_i delta~_i u~_i^T                                    (2)

``U``, ``V``, ``b`` and the statistics are shared by all matrices of one shape; ``s``, ``o`` and ``alpha`` are each
matrix's own.

Where the paper and the official code (eric-mitchell/mend) differ, and what is done here:

1. Sign: the paper subtracts the update, the code adds it and has to learn the sign. Here: minus.
2. ``V``: Xavier-uniform in the paper, N(0, 1) in the code (54 times larger at d = 3840). Here: Xavier.
3. ``alpha``: in the code its own optimiser steps on a gradient that was already zeroed, so it never moves at its own
   rate. Here: one optimiser with two parameter groups.
4. Statistics: over the edit train set in the paper, running in the code. Here: either (``statistics``;
   :mod:`emendo.editors._normalising`). Running ones are updated before use while training, frozen in eval mode.
5. State: the code's "statistics initialised" flag is no buffer, so a resumed run resets them. Here: all are buffers.
6. Bias: Eq. 3b prints none for the second block, the code has one. Here: both blocks have one.
7. ``alpha`` is missing in the paper's Algorithm 2 and present in its text and code. Here: present.
8. ReLU: the code's clamp, whose gradient at 0 is 1 (see :class:`emendo.editors._nets.LowRankBlock`). Here: the clamp.
9. Several edits: the paper transforms each example's factors and sums the edits, the code takes one token-mean loss
   over the batch. Here: the paper's way, so an edit does not depend on the rest of the batch.
10. Loss: the code uses only the paraphrase, Eq. 1 also the edit prompt. Here: both (see
    :mod:`emendo.editors.objective`).
11. Without sharing, the code drops ``s`` and ``o``. Here too: they would be redundant.
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
from emendo.low_rank import LowRank
from emendo.models.capture import Factors
from emendo.models.sites import Site, group_sites


@dataclass(frozen=True, slots=True)
class MendConfig(Settings):
    """MEND's settings; the ablations of the paper's Table 6 are ``norm``, ``identity``, ``shared``, ``factors``.

    The values in parentheses are those of the paper and its code.
    """

    rank: int = setting(256, "Rank of `U V` in each block (1920).", least=1)
    blocks: int = setting(2, "Number of residual blocks (2).", least=1, most=64)
    alpha: float = setting(1e-4, "Step size of every matrix at the start (1e-4).")
    alpha_lr: float = setting(0.01, "Learning rate of `alpha` as a multiple of the editor's.")
    norm: bool = setting(True, "Normalise `u` and `delta`.")
    statistics: Literal["train-set", "running"] = statistics_setting()
    statistics_on: int = statistics_on_setting()
    identity: bool = setting(True, "Residual blocks that start as the identity.")
    shared: bool = setting(True, "One network for each shape; otherwise one for each matrix.")
    factors: Literal["both", "u", "delta", "smaller"] = setting(
        "both", "Factors that the network transforms; the other passes through normalised."
    )
    first_token: float = setting(
        1.0,
        "Share in an edit of the row of a text's first token, whose activations are nearly the same in all texts; "
        "below 1 an edit does less damage elsewhere.",
        least=0,
        most=1,
    )


class _Network(NormalisingNet):
    """The network of the matrices that share one shape."""

    def __init__(self, shape: tuple[int, int], modes: int, config: MendConfig) -> None:
        super().__init__(shape, config)
        d_in, d_out = shape
        smaller = "u" if d_in <= d_out else "delta"
        self.uses = smaller if config.factors == "smaller" else config.factors
        width = {"both": d_in + d_out, "u": d_in, "delta": d_out}[self.uses]
        self.blocks = nn.ModuleList(
            LowRankBlock(width, config.rank, modes, identity=config.identity) for _ in range(config.blocks)
        )

    def forward(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """``(u~, delta~)`` for the rows of each matrix, in the order of its mode."""
        rows, sizes = self.normalised(factors)
        if self.uses == "both":
            rows = self._blocks(rows, sizes)
        u, delta = rows.split(self.shape, -1)
        if self.uses == "u":
            u = self._blocks(u, sizes)
        elif self.uses == "delta":
            delta = self._blocks(delta, sizes)
        return list(zip(u.split(sizes), delta.split(sizes), strict=True))

    def _blocks(self, rows: Tensor, sizes: list[int]) -> Tensor:
        for block in self.blocks:
            rows = block(rows, sizes)
        return rows


class Mend(GroupedEditor):
    """The MEND editor; the module's docstring has its equations."""

    name = "mend"
    Config = MendConfig
    config: MendConfig

    def __init__(
        self, sites: tuple[Site, ...], config: MendConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.members = group_sites(sites, shared=self.config.shared)
        self.nets = nn.ModuleDict(
            {
                key: _Network(sites[members[0]].shape, len(members) * self.config.shared, self.config)
                for key, members in self.members.items()
            }
        )
        self.alpha = nn.Parameter(torch.full((len(sites),), float(self.config.alpha)))

    @property
    def first_token(self) -> float:
        """The setting of that name."""
        return self.config.first_token

    @property
    def networks(self) -> nn.ModuleDict:
        """As in the base class."""
        return self.nets

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """Transform every row and add up the rows of each example (Eq. 2)."""
        return {
            site.name: own.lowrank(-alpha * delta, u)
            for site, alpha, (own, u, delta) in zip(self.sites, self.alpha, self.mapped(factors), strict=True)
        }

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The networks at ``lr``, ``alpha`` at ``alpha_lr * lr``."""
        networks = [p for name, p in self.named_parameters() if name != "alpha"]
        return [
            {"params": networks, "lr": lr},
            {"params": [self.alpha], "lr": lr * self.config.alpha_lr},
        ]
