"""Modules that editors share: the residual low-rank block and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from emendo.capture import Factors


class RunningStats(nn.Module):
    """Mean and standard deviation of every row seen, by Chan's pairwise update; all state is buffers.

    Args:
        width: number of features.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("m2", torch.zeros(width))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in ``rows [n, width]``."""
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        m2 = (rows - mean).square().sum(0)
        total = self.count + len(rows)
        shift = mean - self.mean
        self.mean += shift * (len(rows) / total).to(shift.dtype)
        self.m2 += m2 + shift.square() * (self.count * len(rows) / total).to(shift.dtype)
        self.count.copy_(total)

    def std(self) -> Tensor:
        """Unbiased standard deviation ``[width]``; ones before the second row."""
        if self.count < 2:
            return torch.ones_like(self.mean)
        return (self.m2 / (self.count - 1).to(self.m2.dtype)).sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        """``(rows - mean) / (std + 1e-7)``."""
        return (rows - self.mean) / (self.std() + 1e-7)


def normalise(factors: Sequence[Factors], u_stats: RunningStats, delta_stats: RunningStats) -> list[Factors]:
    """The factors of matrices of one shape, in units of their statistics, which in training mode see them first."""
    if u_stats.training:
        u_stats.update(torch.cat([f.u for f in factors]))
        delta_stats.update(torch.cat([f.delta for f in factors]))
    return [replace(f, u=u_stats(f.u), delta=delta_stats(f.delta)) for f in factors]


class LowRankBlock(nn.Module):
    """MEND Eq. 3a/3b: ``x + clamp(s * (U V x + b) + o, min=0)``, with ``s`` and ``o`` chosen by ``mode``.

    ``U = 0``, ``b = o = 0``, ``s = 1`` at the start, so the block is the identity; ``V`` is Xavier-uniform.
    The clamp is not a ReLU: at the start the pre-activation is exactly 0, where ReLU's gradient is 0 and
    clamp's is 1. Both would compute the same; only the clamp ever learns.

    Args:
        width: features of a row (d = m + n in the paper).
        rank: rank of ``U V``, at most ``width``.
        modes: number of matrices that share the block; 0 leaves out ``s`` and ``o``.
        identity: False gives the ablation "no ID init": Xavier ``U`` and no residual connection.
    """

    def __init__(self, width: int, rank: int, modes: int, *, identity: bool = True) -> None:
        super().__init__()
        rank = min(rank, width)
        self.identity = identity
        self.v = nn.Parameter(torch.empty(rank, width))
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width)) if modes else None
        self.shift = nn.Parameter(torch.zeros(modes, width)) if modes else None
        nn.init.xavier_uniform_(self.v)
        if not identity:
            nn.init.xavier_uniform_(self.u, gain=2**0.5)

    def forward(self, rows: list[Tensor]) -> list[Tensor]:
        """Rows of each mode ``[n_i, width]`` in, rows of the same shapes out."""
        sizes = [len(part) for part in rows]
        x = torch.cat(rows)
        pre = torch.addmm(self.bias, x @ self.v.T, self.u.T)
        parts = list(pre.split(sizes))
        if self.scale is not None and self.shift is not None:
            parts = [
                torch.addcmul(shift, part, scale)
                for part, scale, shift in zip(parts, self.scale, self.shift, strict=True)
            ]
        parts = [part.clamp(min=0) for part in parts]
        return [a + b for a, b in zip(parts, rows, strict=True)] if self.identity else parts
