"""Packing: MLPs compute only the rows that matter.

An MLP works on every position independently, so padding need not pass through it; and in the last block of a decoder
only the label positions need to, because nothing later reads the others. A :class:`Packing` lists the rows of a padded
batch ``[texts, tokens, d]`` that each MLP sees. Hooks gather these rows before it, as ``[1, rows, d]``, and scatter its
outputs after it, with zeros elsewhere. The results at the label positions and all their gradients are the same.

Only an MLP whose structure guarantees this is packed: a module below the block that holds nothing but weight matrices,
activations and dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emendo.low_rank import Deltas, LowRank, applied
from emendo.models._experts import ExpertMatrix
from emendo.models.sites import Site, is_matrix

_PLAIN = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of a padded batch of texts.

    Attributes:
        index: ``[rows]`` positions in the flattened ``texts * tokens``.
        owner: ``[rows]`` the text that each row belongs to.
    """

    index: Tensor
    owner: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The rows that the MLPs see.

    Attributes:
        modules: module name of an MLP -> its rows.
        sites: the same for every site inside one of these MLPs.
    """

    modules: Mapping[str, Rows] = field(default_factory=dict)
    sites: Mapping[str, Rows] = field(default_factory=dict)


def packable(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Site -> the MLP that contains it, for the sites whose MLP can be packed."""
    found = {}
    for site in sites:
        parent = site.name.rpartition(".")[0]
        if isinstance(site.module(model), ExpertMatrix):  # sees the rows that are routed to it
            continue
        below = not site.attention and parent != f"{site.stack}.{site.block}"
        if below and _works_by_row(model.get_submodule(parent)):
            found[site.name] = parent
    return found


def _works_by_row(module: nn.Module) -> bool:
    """Whether a module holds only weight matrices, activations and dropout."""
    if (
        isinstance(module, nn.ModuleList | nn.ModuleDict)
        or next(module.parameters(recurse=False), None) is not None
    ):
        return False
    for inner in module.modules():
        if is_matrix(inner) or type(inner).__module__ in _PLAIN or isinstance(inner, nn.Identity):
            continue
        held = [*inner.parameters(recurse=False), *inner.buffers(recurse=False)]
        if held or next(inner.children(), None) is None:
            return False
    return True


@contextmanager
def packed(model: nn.Module, packing: Packing) -> Iterator[None]:
    """Run ``model`` with each MLP of ``packing`` computing its rows only."""
    with ExitStack() as stack:
        for name, rows in packing.modules.items():
            hooks = _Hooks(rows.index)
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hooks.gather, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(hooks.scatter).remove)
        yield


class _Hooks:
    """Gathers rows of a padded batch before a module, and scatters its outputs after it."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.shape = torch.Size()

    def gather(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.index = self.index.to(first.device)
        self.shape = first.shape[:-1]
        return tuple(map(self._rows, args)), {name: self._rows(value) for name, value in kwargs.items()}

    def _rows(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:-1] != self.shape:
            return value
        return take(value.flatten(0, -2), self.index).unsqueeze(0)

    def scatter(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return put(output.squeeze(0), self.index, self.shape.numel()).view(*self.shape, -1)


@contextmanager
def applied_to_texts(model: nn.Module, deltas: Deltas, edit: Tensor, packing: Packing) -> Iterator[None]:
    """Run ``model`` on a batch with each text under its own edit, also where its rows are packed.

    The changes are applied in their own precision, not in that of the model's activations.

    Args:
        model: the model.
        deltas: site -> changes ``[edits, d_out, r]`` and ``[edits, r, d_in]``.
        edit: ``[texts]`` the edit of each text.
        packing: of the batch.
    """
    slots: dict[tuple[int, int], _Slots] = {}

    def slots_of(rows: Rows | None, count: int) -> _Slots:
        """The slots of ``count`` rows; shared by the sites that see the same rows."""
        key = (id(rows), count)
        if key not in slots:
            own = edit.repeat_interleave(count // len(edit)) if rows is None else edit[rows.owner]
            slots[key] = _Slots(own, len(next(iter(deltas.values())).left))
        return slots[key]

    changes = {
        name: _RowChanges(delta, partial(slots_of, packing.sites.get(name))) for name, delta in deltas.items()
    }
    with applied(model, changes):
        yield


class _Slots:
    """Where each row goes when the rows are sorted by edit and padded: ``place [rows]`` among ``edits * most``."""

    def __init__(self, edit: Tensor, edits: int) -> None:
        count = torch.bincount(edit, minlength=edits)
        order = edit.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(edit)) - (count.cumsum(0) - count)[edit[order]]
        self.edits, self.most = edits, int(count.max())
        self.place = edit * self.most + rank


class _RowChanges:
    """A change for each row, that of its edit: one batched product over the rows sorted by edit."""

    def __init__(self, delta: LowRank, slots: Callable[[int], _Slots]) -> None:
        self.right, self.left, self.slots = delta.right.mT, delta.left.mT, slots

    def __call__(self, x: Tensor) -> Tensor:
        if self.right.device != x.device:
            self.left, self.right = self.left.to(x.device), self.right.to(x.device)
        x = x.flatten(0, -2)
        if len(self.right) == 1:  # every row has the same edit
            return self._change(x.unsqueeze(0))
        slots = self.slots(len(x))
        place = slots.place.to(x.device)
        padded = put(x, place, slots.edits * slots.most).view(slots.edits, slots.most, -1)
        return take(self._change(padded).flatten(0, 1), place)

    def _change(self, x: Tensor) -> Tensor:
        return ((x.to(self.right.dtype) @ self.right) @ self.left).to(x.dtype)


_MULTIPLE = 32


def padded_count(count: int, like: Tensor) -> int:
    """``count`` rows rounded up to a multiple of 32 where every number of rows compiles a kernel of its own.

    oneDNN, which multiplies half-precision matrices on a processor, takes 1 to 3 ms to compile one, and caches it.
    """
    half = like.dtype in (torch.bfloat16, torch.float16) and like.device.type == "cpu"
    return -(-count // _MULTIPLE) * _MULTIPLE if half else count


def take(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``: ``[n, d]`` from ``[count, d]`` at distinct places ``[n]``; its gradient is :func:`put`.

    The backward pass of torch's ``index_select`` adds up rows where copying them is enough.
    """
    found: Tensor = _Take.apply(rows, index)
    return found


def put(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """``[count, d]`` of zeros with ``rows [n, d]`` at distinct places ``index [n]``; its gradient is :func:`take`."""
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
