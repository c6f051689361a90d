"""Distinct rows out of a matrix, and back into one; the one is the gradient of the other.

Going back, torch's own ``index_select`` adds where copying is enough, and its ``index_copy`` copies the zeros first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STEP = 32


def even(count: int, like: Tensor) -> int:
    """So many rows of a product, or a few more where each number of rows has a kernel compiled for it.

    oneDNN, which multiplies half precision on a processor, takes 1 to 3 ms to compile one, and keeps it.
    """
    half = like.dtype in (torch.bfloat16, torch.float16) and like.device.type == "cpu"
    return -(-count // _STEP) * _STEP if half else count


def take(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``: ``[n, d]`` from ``[count, d]`` at distinct places ``[n]``."""
    found: Tensor = _Take.apply(rows, index)
    return found


def put(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """``[count, d]`` of zeros with ``rows [n, d]`` at distinct places ``index [n]``."""
    spread: Tensor = _Put.apply(rows, index, count)
    return spread


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return put(gradient, index, ctx.count), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(count, rows.shape[-1]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return take(gradient, index), None, None
