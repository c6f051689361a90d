"""The weights that an edit changes: their norms, and merging changes into them.

Beside a matrix (:func:`emendo.low_rank.applied`) a change is exact and can be removed without trace. Merged it costs
nothing at run time, but ``W + dW`` is rounded to the dtype of the weights: in bfloat16 a change of a thousandth of the
weights' size loses half of its effect. Subtracting the change does not undo a merge, since ``(w + d) - d`` often is not
``w``; an exact undo needs the old tensors, which are kept by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emendo.errors import ModelError, RequestError
from emendo.low_rank import Deltas
from emendo.models.offloading import refuse_offloaded, weight_of
from emendo.models.sites import all_sites

_ROWS = 1024  # of an identity matrix that go through a packed matrix at once


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge, and the way to undo it.

    Attributes:
        losses: by module name, ``||(W' - W) - dW|| / ||dW||`` (Frobenius): the error of the change by rounding. 0 is an
            exact merge; at 1 nothing of the change is left.
        loss: the same over all matrices together.
    """

    losses: Mapping[str, float]
    loss: float
    _kept: Mapping[str, tuple[Tensor, Tensor]]  # name -> (the model's own tensor, its old content)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the old weights back, bit for bit.

        Raises:
            RequestError: they were not kept.
        """
        if not self._kept:
            raise RequestError(
                "The old weights were not kept (keep=False), so there is nothing to restore from."
            )
        for weight, old in self._kept.values():
            weight.copy_(old)


@torch.no_grad()
def merge(model: nn.Module, deltas: Deltas, *, keep: bool = True) -> Merged:
    """Add each change to its matrix, in place; all of them or, on an error, none.

    Args:
        model: the model to change.
        deltas: module name -> the change of its weight.
        keep: keep a copy of the old tensors for :meth:`Merged.restore`.

    Raises:
        ModelError: a matrix is quantised, so that nothing can be added to it, or does not exist.
        RequestError: some weights of the model are offloaded.
    """
    refuse_offloaded(model, "Merging an edit")
    sites = {site.name: site for site in all_sites(model)}
    weights = {}
    for name, delta in deltas.items():
        if name not in sites:
            raise ModelError(f"The model has no matrix {name}; this change belongs to another model.")
        weight = sites[name].weight(model)
        d_in, d_out = delta.shape
        if not weight.is_floating_point() or weight.shape != (d_out, d_in):
            raise ModelError(
                f"A change of {d_out} x {d_in} cannot be added to {name}, which is stored as {weight.dtype} "
                f"{tuple(weight.shape)}, as quantised matrices are. Attach the edit beside it instead."
            )
        weights[name] = weight
    kept = {name: (weight, weight.clone()) for name, weight in weights.items()} if keep else {}
    lost, size = {}, {}
    for name, weight in weights.items():
        wide = torch.promote_types(weight.dtype, torch.float64)
        change = deltas[name].to(weight.device).to(wide).dense()
        before = weight.to(wide)
        weight.copy_(before + change)
        lost[name] = float((weight.to(wide) - before - change).square().sum())
        size[name] = float(change.square().sum())
    return Merged(
        losses={name: (lost[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in weights},
        loss=(sum(lost.values()) / total) ** 0.5 if (total := sum(size.values())) else 0.0,
        _kept=kept,
    )


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a ``Linear`` (of any library) or a ``Conv1D``; None for other modules."""
    for d_in, d_out in (("in_features", "out_features"), ("nx", "nf")):
        shape = getattr(module, d_in, None), getattr(module, d_out, None)
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            return shape[0], shape[1]
    return None


@torch.no_grad()
def weight_norm(module: nn.Module, shape: tuple[int, int]) -> float:
    """``||W||`` (Frobenius) of the matrix that a module multiplies by, however it is stored.

    A plain weight is read. Anything else (4 or 8 bits, packed, with scales beside it) is multiplied with the identity
    matrix by the module itself, whatever library it comes from: the rows of the product are those of ``W^T``.

    Args:
        module: a linear layer.
        shape: its ``(d_in, d_out)``.
    """
    weight = weight_of(module) if hasattr(module, "weight") else None
    if isinstance(weight, Tensor) and _is_plain(weight) and sorted(weight.shape) == sorted(shape):
        return float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else None
    dtypes = [t.dtype for t in tensors if t.is_floating_point() and t.itemsize > 1]
    eye = torch.eye(shape[0], device=device, dtype=dtypes[0] if dtypes else torch.get_default_dtype())
    bias = module.forward(torch.zeros_like(eye[:1])).double()  # forward: hooks would add attached edits
    squares = [(module.forward(rows).double() - bias).square().sum() for rows in eye.split(_ROWS)]
    return float(torch.stack(squares).sum().sqrt())


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor holds its numbers as they are: floats of at least 16 bits, not wrapped by a library."""
    return type(weight.data) is Tensor and weight.is_floating_point() and weight.itemsize > 1
