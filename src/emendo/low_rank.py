"""Low-rank changes of weight matrices, kept as factors.

Layout, everywhere in emendo: a change of a matrix that maps ``d_in`` to ``d_out`` features is

    dW = left @ right        left [..., d_out, r]    right [..., r, d_in]

and is applied to rows ``x [..., d_in]`` as ``(x @ right^T) @ left^T``. Leading dimensions, where there are
any, count examples that each have a change of their own. The product is formed only by :meth:`dense`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change ``left @ right`` of one weight matrix, or one change for each of several examples.

    Attributes:
        left: ``[d_out, r]`` or ``[examples, d_out, r]``.
        right: ``[r, d_in]`` or ``[examples, r, d_in]``.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of ``left``: an upper bound of the change's rank."""
        return self.left.shape[-1]

    @property
    def batched(self) -> bool:
        """Whether there is one change for each of several examples."""
        return self.left.dim() == 3

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ dW^T`` for ``x [..., d_in]``; with a change for each example, ``x [examples, ..., d_in]``."""
        right, left = self.right.to(x.dtype).mT, self.left.to(x.dtype).mT
        return (x @ right) @ left

    def __getitem__(self, index: int | Tensor | slice) -> LowRank:
        """The changes of some of the examples."""
        return LowRank(self.left[index], self.right[index])

    def take(self, index: Tensor) -> LowRank:
        """The changes of the examples ``index [n]``, in that order; its backward pass is faster than indexing's."""
        return LowRank(self.left.index_select(0, index), self.right.index_select(0, index))

    def __add__(self, other: LowRank) -> LowRank:
        """The sum of two changes; ranks add."""
        return LowRank.concatenate([self, other])

    @classmethod
    def concatenate(cls, changes: Sequence[LowRank]) -> LowRank:
        """The sum of several changes of one matrix; ranks add, nothing is lost."""
        if len(changes) == 1:
            return changes[0]
        return cls(torch.cat([c.left for c in changes], -1), torch.cat([c.right for c in changes], -2))

    def scale(self, factor: float) -> LowRank:
        """``factor * dW``."""
        return LowRank(self.left * factor, self.right)

    def to(self, target: torch.device | torch.dtype | str) -> LowRank:
        """Both factors on another device or in another dtype."""
        return LowRank(self.left.to(target), self.right.to(target))

    def sum(self) -> LowRank:
        """The sum over the examples as one change of rank ``examples * r``."""
        if not self.batched:
            return self
        return LowRank(self.left.transpose(0, 1).flatten(1), self.right.flatten(0, 1))

    def group(self, size: int) -> LowRank:
        """The sums of every ``size`` consecutive changes: ``[examples / size, d_out, size * r]`` and its like."""
        count, d_out, rank = self.left.shape
        left = self.left.view(count // size, size, d_out, rank).transpose(1, 2).flatten(2)
        return LowRank(left, self.right.reshape(count // size, size * rank, -1))

    @classmethod
    def stack(cls, changes: Sequence[LowRank]) -> LowRank:
        """Several changes of one matrix as one for each example; lower ranks are filled up with zeros."""
        rank = max(change.rank for change in changes)
        left = [pad(change.left, (0, rank - change.rank)) for change in changes]
        right = [pad(change.right, (0, 0, 0, rank - change.rank)) for change in changes]
        return cls(torch.stack(left), torch.stack(right))

    @classmethod
    def from_dense(cls, change: Tensor) -> LowRank:
        """A dense change ``[..., d_out, d_in]`` as it is: one factor is the identity, nothing is lost or computed."""
        d_out, d_in = change.shape[-2:]
        eye = torch.eye(min(d_out, d_in), dtype=change.dtype, device=change.device)
        eye = eye.expand(*change.shape[:-2], *eye.shape)
        return cls(change, eye) if d_in <= d_out else cls(eye, change)

    def dense(self) -> Tensor:
        """``dW [..., d_out, d_in]`` itself."""
        return self.left @ self.right

    def norm(self) -> Tensor:
        """Frobenius norm ``[...]``, from the factors: ``||LR||^2 = <L^T L, R R^T>``, in float64."""
        left, right = self.left.double(), self.right.double()
        return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1)).clamp(min=0).sqrt()

    def compact(self, rank: int | None = None, tolerance: float = 0.0) -> LowRank:
        """The best approximation of lower rank, by QR of both factors and an SVD of their small core.

        Args:
            rank: the most columns to keep; by default as many as ``tolerance`` asks for.
            tolerance: drop trailing singular values while ``||dropped|| <= tolerance * ||dW||``. With 0, only
                what is numerically zero in the factors' dtype is dropped.

        Returns:
            One change with orthogonal columns; ``left`` and ``right`` share the singular values evenly.
        """
        if self.batched:
            raise ValueError(
                "compact() takes one change, not one for each example; call sum() or index first."
            )
        q_left, r_left = torch.linalg.qr(self.left.double())
        q_right, r_right = torch.linalg.qr(self.right.double().mT)
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
        u, vh = u[:, : len(s)], vh[: len(s)]
        tail = s.square().flip(0).cumsum(0).flip(0).sqrt()  # tail[i] = norm of s[i:]
        floor = max(tolerance, torch.finfo(self.left.dtype).eps * 4)
        keep = int((tail > floor * tail[0]).sum()) if len(s) else 0
        keep = max(1, keep if rank is None else min(keep, rank))
        root = s[:keep].sqrt()
        left = (q_left @ u[:, :keep]) * root
        right = (root[:, None] * vh[:keep]) @ q_right.mT
        return LowRank(left.to(self.left.dtype), right.to(self.right.dtype))


Deltas = Mapping[str, LowRank]
"""Module name -> its change."""


@contextmanager
def applied(model: nn.Module, deltas: Deltas) -> Iterator[None]:
    """Run ``model`` with the changes added beside its matrices; the weights are never touched.

    Each change is a forward hook that adds ``dW x`` to the module's output, so it is differentiable in the
    factors, blind to how the module stores its weight, and gone without trace afterwards, also after an
    exception. Changes with an examples dimension give row ``i`` of the batch change ``i``.
    """
    handles = []
    try:
        for name, delta in deltas.items():
            handles.append(model.get_submodule(name).register_forward_hook(_adder(delta)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _adder:  # noqa: N801 - a function with a memory of what it cast
    """The forward hook of one change; keeps its factors in the dtype and on the device of the stream.

    A change whose factors are larger than the matrix it changes (many edits composed, a dense change) is multiplied out
    once, so that it never costs more than the matrix does.
    """

    def __init__(self, delta: LowRank) -> None:
        self.left, self.right = delta.left.mT, delta.right.mT
        self.dense: Tensor | None = None
        rank, (d_in, d_out) = delta.rank, (self.right.shape[-2], self.left.shape[-1])
        learnt = self.left.requires_grad or self.right.requires_grad
        if not delta.batched and not learnt and rank * (d_in + d_out) > d_in * d_out:
            self.dense = self.right @ self.left

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if self.right.dtype != x.dtype or self.right.device != x.device:
            self.left, self.right = self.left.to(x), self.right.to(x)
            self.dense = self.dense if self.dense is None else self.dense.to(x)
        if self.dense is not None:
            return output + x @ self.dense
        if self.right.dim() == 3 and x.dim() == 2:  # some blocks (OPT's) flatten their tokens
            x = x.reshape(len(self.right), -1, x.shape[-1])
        return output + ((x @ self.right) @ self.left).view(output.shape)
