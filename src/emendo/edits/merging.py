"""Merging low-rank changes into a model's weights, with a word on what the weights' dtype loses.

Beside a matrix (:func:`emendo.low_rank.applied`) a change is exact and comes off without trace. Merged it costs nothing
at run time, but ``W + dW`` is rounded to the weights' dtype: in bfloat16 a change of a thousandth of the weights' size
loses half of its effect. Subtracting it again is no undo, for ``(w + d) - d`` is often not ``w``; an exact one needs
the old tensors, which are kept unless the caller says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emendo.errors import ModelError, RequestError
from emendo.low_rank import Deltas
from emendo.models.sites import all_sites


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merge did.

    Attributes:
        losses: by module name, ``||(W' - W) - dW|| / ||dW||`` (Frobenius): the part of the change that rounding lost or
            made up. 0 is an exact merge, 1 as bad as none.
        loss: the same over all matrices together.
    """

    losses: Mapping[str, float]
    loss: float
    _kept: Mapping[str, tuple[Tensor, Tensor]]  # name -> (the model's own tensor, what was in it)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the old tensors back, bit for bit.

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
        model: whose weights are changed.
        deltas: module name -> its change.
        keep: keep a copy of the old tensors for :meth:`Merged.restore`.

    Raises:
        ModelError: a matrix is quantised, so that it cannot take the change, or is not there.
    """
    sites = {site.name: site for site in all_sites(model)}
    weights = {}
    for name, delta in deltas.items():
        if name not in sites:
            raise ModelError(f"The model has no matrix {name}; this change belongs to another model.")
        weight = sites[name].weight(model)
        shape = (delta.left.shape[-2], delta.right.shape[-1])
        if not weight.is_floating_point() or weight.shape != shape:
            raise ModelError(
                f"{name} cannot take a change of {shape[0]} x {shape[1]}: it is stored as {weight.dtype} "
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
