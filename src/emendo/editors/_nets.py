"""Modules that editors share: the residual low-rank block and running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from emendo.models.capture import Factors


class RunningStats(nn.Module):
    """Mean and standard deviation of every row seen, by Chan's pairwise form of Welford's update in float64.

    All state is buffers, so that a resumed pass equals an uninterrupted one.

    Args:
        width: number of features.

    Attributes:
        gather: stacks a tensor with those of the other processes of a run (:class:`emendo.train.processes.World`), so
            that every one of them sees the rows of all; None where there is one process.
    """

    gather: Callable[[Tensor], Tensor] | None = None
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Update the statistics with ``rows [n, width]``, and with those of the other processes."""
        rows = rows.to(self.mean)
        mean = rows.mean(0) if len(rows) else torch.zeros_like(self.mean)
        apart = rows - mean
        own = torch.cat([self.count.new_full((1,), len(rows)), mean, apart.mul_(apart).sum(0)])
        for values in own[None] if self.gather is None else self.gather(own):
            self._merge(*values.split([1, len(mean), len(mean)]))

    def _merge(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count[0]
        part = total.clamp(min=1)
        shift = mean - self.mean
        self.mean += shift * (count / part)
        self.m2 += m2 + shift.square() * (self.count * count / part)
        self.count.copy_(total)

    def std(self) -> Tensor:
        """Unbiased standard deviation ``[width]``; ones before the second row."""
        if self.count < 2:
            return torch.ones_like(self.mean)
        return (self.m2 / (self.count - 1)).sqrt()

    def forward(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """``(rows - mean) / (std + 1e-7)``; ``out`` may be the rows themselves."""
        return torch.sub(rows, self.mean.to(rows), out=out).div_((self.std() + 1e-7).to(rows))


def joined(factors: Sequence[Factors]) -> tuple[Tensor, list[int]]:
    """Rows ``[n, d_in + d_out]`` of u and delta of matrices of one shape, and the number of rows of each matrix."""
    return torch.cat([torch.cat([f.u, f.delta], -1) for f in factors]), [len(f.u) for f in factors]


class LowRankBlock(nn.Module):
    """MEND Eq. 3a/3b: ``x + clamp(s * (U V x + b) + o, min=0)``, with ``s`` and ``o`` chosen by ``mode``.

    ``U = 0``, ``b = o = 0``, ``s = 1`` at the start, so the block is the identity; ``V`` is Xavier-uniform.
    The clamp is not a ReLU: at the start the pre-activation is exactly 0, where ReLU's gradient is 0 and
    clamp's is 1. Both compute the same values; only the clamp learns.

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

    def forward(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows ``[n, width]`` of all modes, ``sizes`` of each one after the other, to rows of the same shape."""
        changed: Tensor = _Block.apply(
            rows, self.v, self.u, self.bias, self.scale, self.shift, tuple(sizes), self.identity
        )
        return changed


class _Block(torch.autograd.Function):
    """The block with a hand-written gradient: each elementwise pass over the rows happens once, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        u: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        sizes: tuple[int, ...],
        identity: bool,
    ) -> Tensor:
        inner = x @ v.T
        pre = inner @ u.T  # without the bias, which goes into the shift
        if scale is None or shift is None:
            y = pre + bias
        else:
            y = torch.empty_like(pre)
            moved = torch.addcmul(shift, bias, scale)
            for part in zip(moved, pre.split(sizes), scale, y.split(sizes), strict=True):
                torch.addcmul(*part[:3], out=part[3])
        passed = torch.ge(
            y, 0, out=torch.empty_like(y)
        )  # as numbers: a product with booleans takes four times as long
        ctx.save_for_backward(x, v, u, bias, scale, inner, pre, passed)
        ctx.sizes, ctx.identity = sizes, identity
        y.clamp_(min=0)
        return y.add_(x) if identity else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u, bias, scale, inner, pre, passed = ctx.saved_tensors
        own = gradient * passed
        to_scale = to_shift = None
        if scale is None:
            to_bias = own.sum(0)
        else:
            parts = list(zip(own.split(ctx.sizes), pre.split(ctx.sizes), scale, strict=True))
            to_shift = torch.stack([part.sum(0) for part, _, _ in parts])
            to_scale = torch.stack([(part * value).sum(0) for part, value, _ in parts]).addcmul_(
                to_shift, bias
            )
            to_bias = (to_shift * scale).sum(0)
            for part, _, factor in parts:
                part.mul_(factor)
        back = own @ u
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.addmm(gradient, back, v) if ctx.identity else back @ v
        return to_x, back.T @ x, own.T @ inner, to_bias, to_scale, to_shift, None, None
