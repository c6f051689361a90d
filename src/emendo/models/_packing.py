"""MLPs that see only the rows that matter.

An MLP works on every position by itself, so padding need not go through it; and in the last block of a decoder only the
label positions do, for nothing later reads the others. A :class:`Packing` says which rows of a padded batch
``[texts, tokens, d]`` each MLP sees; hooks gather them before it, ``[1, rows, d]``, and put its outputs back after it,
with zeros elsewhere. What is computed at the label positions, and every gradient of it, is the same.

Only an MLP that is safe by its structure is packed: a module below the block that holds nothing but weight matrices,
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

from emendo.low_rank import LowRank
from emendo.models.sites import Site, is_matrix

_PLAIN = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of a padded batch of texts.

    Attributes:
        index: ``[rows]`` places in the flattened ``texts * tokens``.
        owner: ``[rows]`` the text of each.
    """

    index: Tensor
    owner: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Which rows the MLPs see.

    Attributes:
        modules: MLP -> its rows, by module name.
        sites: the same for every site inside of one of them.
    """

    modules: Mapping[str, Rows] = field(default_factory=dict)
    sites: Mapping[str, Rows] = field(default_factory=dict)


def packable(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Site -> the MLP that it stands in, for the sites whose MLP can be packed."""
    found = {}
    for site in sites:
        parent = site.name.rpartition(".")[0]
        below = not site.attention and parent != f"{site.stack}.{site.block}"
        if below and _works_by_row(model.get_submodule(parent)):
            found[site.name] = parent
    return found


def _works_by_row(module: nn.Module) -> bool:
    """Whether it holds weight matrices, activations and dropout only."""
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
    """Run ``model`` with its MLPs on their rows only."""
    with ExitStack() as stack:
        for name, rows in packing.modules.items():
            hooks = _Hooks(rows.index)
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hooks.gather).remove)
            stack.callback(module.register_forward_hook(hooks.scatter).remove)
        yield


class _Hooks:
    """Rows out of a padded stream, and back into it."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.shape = torch.Size()

    def gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.index = self.index.to(args[0].device)
        self.shape = args[0].shape[:-1]
        return (take(args[0].flatten(0, -2), self.index).unsqueeze(0), *args[1:])

    def scatter(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return put(output.squeeze(0), self.index, self.shape.numel()).view(*self.shape, -1)


@contextmanager
def edited(model: nn.Module, deltas: Mapping[str, LowRank], edit: Tensor, packing: Packing) -> Iterator[None]:
    """Run ``model`` on a batch of texts each of which has a change of its own, also where its rows are packed.

    Args:
        model: the model.
        deltas: by site, changes ``[edits, d_out, r]`` and ``[edits, r, d_in]``.
        edit: ``[texts]`` the edit that each text stands under.
        packing: of the batch.
    """
    slots: dict[tuple[int, int], _Slots] = {}

    def place(rows: Rows | None, count: int) -> _Slots:
        """Of so many rows; without a packing every text has as many."""
        key = (id(rows), count)
        if key not in slots:
            own = edit.repeat_interleave(count // len(edit)) if rows is None else edit[rows.owner]
            slots[key] = _Slots(own, len(next(iter(deltas.values())).left))
        return slots[key]

    with ExitStack() as stack:
        for name, delta in deltas.items():
            hook = _RowAdder(delta, partial(place, packing.sites.get(name)))
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


class _Slots:
    """Where each row goes when the rows of each edit are put together: ``place [rows]`` among ``edits * most``."""

    def __init__(self, edit: Tensor, edits: int) -> None:
        count = torch.bincount(edit, minlength=edits)
        order = edit.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(edit)) - (count.cumsum(0) - count)[edit[order]]
        self.edits, self.most = edits, int(count.max())
        self.place = edit * self.most + rank


class _RowAdder:
    """The forward hook that adds to each row the change of its edit, in the change's own precision."""

    def __init__(self, delta: LowRank, slots: Callable[[int], _Slots]) -> None:
        self.right, self.left, self.slots = delta.right.mT, delta.left.mT, slots

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.right.device != output.device:
            self.left, self.right = self.left.to(output.device), self.right.to(output.device)
        x = args[0].flatten(0, -2)
        if len(self.right) == 1:  # every row stands under the same edit
            added = self._change(x.unsqueeze(0)).squeeze(0)
        else:
            slots = self.slots(len(x))
            place = slots.place.to(x.device)
            padded = put(x, place, slots.edits * slots.most).view(slots.edits, slots.most, -1)
            added = take(self._change(padded).flatten(0, 1), place)
        return output + added.view(output.shape)

    def _change(self, x: Tensor) -> Tensor:
        return ((x.to(self.right.dtype) @ self.right) @ self.left).to(x.dtype)


# --------------------
# Distinct rows out of a matrix, and back into one; the one is the gradient of the other.
#
# Going back, torch's own ``index_select`` adds where copying is enough, and its ``index_copy`` copies the zeros first.

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
