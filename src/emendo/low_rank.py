"""Low-rank changes of weight matrices, kept as factors, and the hook that applies them.

Throughout emendo, a change of a matrix that maps ``d_in`` features to ``d_out`` is

    dW = left @ right        left [..., d_out, r]    right [..., r, d_in]

and is applied to rows ``x [..., d_in]`` as ``(x @ right^T) @ left^T``. A leading dimension holds one change for each
example. Only :meth:`LowRank.dense` forms the product.

:func:`applied` is the only place where a change meets a model: a forward hook that adds ``change(x)`` to a matrix's
output. A change is any function of the matrix's input rows: a :class:`LowRank` for the whole batch or for each example,
:class:`RowGroups` for groups of rows, and the packed rows of :mod:`emendo.models._packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from emendo.errors import RequestError


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
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)`` of the matrix that is changed."""
        return self.right.shape[-1], self.left.shape[-2]

    @property
    def batched(self) -> bool:
        """Whether there is one change for each of several examples."""
        return self.left.dim() == 3

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ dW^T`` for ``x [..., d_in]``; with a change for each example, ``x [examples, ..., d_in]``."""
        right, left = self.right.to(x.dtype).mT, self.left.to(x.dtype).mT
        return (x @ right) @ left

    def __getitem__(self, index: int | Tensor | slice) -> LowRank:
        """The changes of selected examples."""
        return LowRank(self.left[index], self.right[index])

    def take(self, index: Tensor) -> LowRank:
        """The changes of the examples ``index [n]`` in that order; differentiates faster than indexing."""
        return LowRank(self.left.index_select(0, index), self.right.index_select(0, index))

    def __add__(self, other: LowRank) -> LowRank:
        """The sum of two changes; their ranks add up."""
        return LowRank.concatenate([self, other])

    @classmethod
    def concatenate(cls, changes: Sequence[LowRank]) -> LowRank:
        """The exact sum of several changes of one matrix; their ranks add up."""
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
        """The sum of every ``size`` consecutive changes: ``left`` becomes ``[examples / size, d_out, size * r]``."""
        count, d_out, rank = self.left.shape
        left = self.left.view(count // size, size, d_out, rank).transpose(1, 2).flatten(2)
        return LowRank(left, self.right.reshape(count // size, size * rank, -1))

    @classmethod
    def stack(cls, changes: Sequence[LowRank]) -> LowRank:
        """Several changes of one matrix as one batch of changes; lower ranks are padded with zeros."""
        rank = max(change.rank for change in changes)
        left = [pad(change.left, (0, rank - change.rank)) for change in changes]
        right = [pad(change.right, (0, 0, 0, rank - change.rank)) for change in changes]
        return cls(torch.stack(left), torch.stack(right))

    @classmethod
    def from_dense(cls, change: Tensor) -> LowRank:
        """A dense change ``[..., d_out, d_in]`` as factors, one of which is the identity; exact."""
        d_out, d_in = change.shape[-2:]
        eye = torch.eye(min(d_out, d_in), dtype=change.dtype, device=change.device)
        eye = eye.expand(*change.shape[:-2], *eye.shape)
        return cls(change, eye) if d_in <= d_out else cls(eye, change)

    def dense(self) -> Tensor:
        """The product ``dW [..., d_out, d_in]``."""
        return self.left @ self.right

    @property
    def is_compact(self) -> bool:
        """Whether the factors have fewer numbers than the matrix."""
        d_in, d_out = self.shape
        return self.rank * (d_out + d_in) < d_out * d_in

    def norm(self) -> Tensor:
        """Frobenius norm ``[...]``, from the factors: ``||LR||^2 = <L^T L, R R^T>``, in float64."""
        left, right = self.left.double(), self.right.double()
        return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1)).clamp(min=0).sqrt()

    def compact(self, rank: int | None = None, tolerance: float = 0.0) -> LowRank:
        """The best approximation of lower rank (Eckart-Young), by QR of both factors and an SVD of their small core.

        Args:
            rank: largest number of columns to keep; by default ``tolerance`` alone decides.
            tolerance: drop trailing singular values while ``||dropped|| <= tolerance * ||dW||``. With 0, only
                singular values that are numerically zero in the factors' dtype are dropped.

        Returns:
            One change with orthogonal columns; ``left`` and ``right`` share the singular values evenly.
        """
        if self.batched:
            raise ValueError(
                "compact() takes one change, not a batch of them: call sum() first, or index one example."
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


def total(changes: Iterable[Deltas]) -> dict[str, LowRank]:
    """The exact sum of several changes of a model, matrix by matrix; ranks add up."""
    parts: dict[str, list[LowRank]] = {}
    for deltas in changes:
        for name, delta in deltas.items():
            parts.setdefault(name, []).append(delta)
    return {name: LowRank.concatenate(own) for name, own in parts.items()}


def to_tensors(deltas: Deltas) -> dict[str, Tensor]:
    """The factors by name, as they are stored: ``NAME.left`` and ``NAME.right``."""
    sides = ("left", "right")
    return {f"{name}.{side}": getattr(delta, side) for name, delta in deltas.items() for side in sides}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The inverse of :func:`to_tensors`.

    Raises:
        KeyError: a factor is missing.
        ValueError: a tensor that is no factor; named.
    """
    names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
    if odd := set(tensors) - {f"{name}.{side}" for name in names for side in ("left", "right")}:
        raise ValueError(min(odd))
    return {name: LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}


Change = Callable[[Tensor], Tensor]
"""Maps inputs ``x [..., d_in]`` of a matrix to the addition to its outputs, of as many elements as ``[..., d_out]``."""


@contextmanager
def applied(model: nn.Module, changes: Mapping[str, LowRank | Change]) -> Iterator[None]:
    """Run ``model`` with changes added beside its matrices; the weights themselves are never touched.

    Each change is a forward hook that adds ``change(x)`` to a module's output. It is differentiable in the factors,
    independent of how the module stores its weight, and removed on exit, also after an exception. A batched
    :class:`LowRank` gives row ``i`` of the batch change ``i``.

    Args:
        model: the model.
        changes: module name -> its change.
    """
    with ExitStack() as stack:
        for name, change in changes.items():
            module = model.get_submodule(name)
            by_row = isinstance(change, LowRank) and not change.batched
            stack.callback(module.register_forward_hook(_hook(prepared(change), by_row=by_row)).remove)
        yield


def _hook(change: Change, *, by_row: bool) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        routed = getattr(module, "rows", None)  # an expert sees some rows of the batch only
        if routed is None or by_row:
            return output + change(args[0]).view(output.shape)
        index, count = routed
        x = args[0].new_zeros(count, args[0].shape[-1]).index_copy(0, index, args[0])
        return output + change(x).view(count, -1).index_select(0, index)

    return hook


def prepared(change: LowRank | Change) -> Change:
    """The change as a function of input rows, in their dtype and on their device after the first call.

    :func:`applied` and :class:`RowGroups` prepare what they are given; whoever applies a change many times prepares it
    once.
    """
    return _Cast(change) if isinstance(change, LowRank) else change


class _Cast:
    """A change in the dtype and on the device of the rows it was last applied to.

    A change whose factors are larger than the matrix it changes (many composed edits, a dense change) is multiplied out
    once, so it never costs more than the matrix does.
    """

    def __init__(self, delta: LowRank) -> None:
        self.left, self.right = delta.left.mT, delta.right.mT
        self.dense: Tensor | None = None
        rank, (d_in, d_out) = delta.rank, (self.right.shape[-2], self.left.shape[-1])
        trained = self.left.requires_grad or self.right.requires_grad
        if not delta.batched and not trained and rank * (d_in + d_out) > d_in * d_out:
            self.dense = self.right @ self.left

    def __call__(self, x: Tensor) -> Tensor:
        if self.right.dtype != x.dtype or self.right.device != x.device:
            self.left, self.right = self.left.to(x), self.right.to(x)
            self.dense = self.dense if self.dense is None else self.dense.to(x)
        if self.dense is not None:
            return x @ self.dense
        if self.right.dim() == 3 and x.dim() == 2:  # some blocks (OPT's) flatten their tokens
            x = x.reshape(len(self.right), -1, x.shape[-1])
        return (x @ self.right) @ self.left


class RowGroups:
    """A change of one matrix that differs between groups of rows of a batch.

    The rows of a group share their arithmetic. A row in no group keeps its output bit for bit.

    Args:
        size: number of rows of a batch.
        groups: the row indices of each group, and the group's change; no row is in two groups.
    """

    def __init__(self, size: int, groups: Sequence[tuple[Sequence[int], LowRank | Change]]) -> None:
        self.size = size
        self.changes = [prepared(change) for _, change in groups]
        self.counts = [len(rows) for rows, _ in groups]
        self.single = all(count == 1 for count in self.counts)
        self.order = torch.tensor([row for rows, _ in groups for row in rows])
        self.complete = self.order.equal(torch.arange(size))

    def __call__(self, x: Tensor) -> Tensor:
        """The addition to the outputs of ``x [size, ..., d_in]``, or of ``x [size * tokens, d_in]``.

        Raises:
            RequestError: the batch has another number of rows.
        """
        if x.dim() == 2 and len(x) % self.size == 0:  # some blocks (OPT's) flatten their tokens
            x = x.view(self.size, -1, x.shape[-1])
        if len(x) != self.size:
            raise RequestError(
                f"Edits were given for {self.size} rows, but the model was called with a batch of {len(x)}."
            )
        self.order = self.order.to(x.device)
        rows = x if self.complete else x.index_select(0, self.order)
        parts = zip(self.changes, rows.unbind() if self.single else rows.split(self.counts), strict=True)
        changed = [change(part) for change, part in parts]
        added = torch.stack(changed) if self.single else torch.cat(changed)
        if self.complete:
            return added
        nothing = added.new_full(
            (self.size, *added.shape[1:]), -0.0
        )  # unlike 0.0, it changes no number, not even -0.0
        return nothing.index_copy(0, self.order, added)
