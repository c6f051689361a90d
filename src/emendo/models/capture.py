"""Capture: run a model and record the two factors of the fine-tuning gradient at each site.

For a matrix that computes ``y = W u (+ b)``, the gradient of a loss is ``sum_i delta_i u_i^T`` over all rows ``i`` (one
per token), where ``u`` is the matrix's input and ``delta = dL/dy`` (MEND, section 3.1). The examples' losses are summed
before differentiation; this gives every example its own ``delta`` in one backward pass, because no row of one example
depends on another example.

No parameter's ``.grad`` is touched, and nothing below the first site is differentiated. By default there is no
second-order graph: ``u`` and ``delta`` are constants for the editor trained on them. A method that trains the model
itself (ENN) requests the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emendo.errors import ModelError
from emendo.low_rank import LowRank
from emendo.models._packing import put
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The rank-1 factors of one site's gradient, one row for each token that carries gradient.

    Attributes:
        u: ``[rows, d_in]`` inputs of the matrix, float32 (float64 from a float64 model).
        delta: ``[rows, d_out]`` gradients of the loss with respect to its outputs, in the same dtype.
        owner: ``[rows]`` index of the example each row belongs to, ascending.
        examples: how many examples there are.
    """

    u: Tensor
    delta: Tensor
    owner: Tensor
    examples: int

    def lowrank(self, left: Tensor, right: Tensor) -> LowRank:
        """Turn rows into one change for each example, ``sum_i left_i right_i^T`` over the example's rows.

        Args:
            left: ``[rows, d_out]``.
            right: ``[rows, d_in]``.

        Returns:
            Factors ``[examples, d_out, r]`` and ``[examples, r, d_in]``, where ``r`` is the largest number of rows of
            any example; missing rows are zero.
        """
        count = torch.bincount(self.owner, minlength=self.examples)
        start = count.cumsum(0) - count
        slot = torch.arange(len(self.owner), device=self.owner.device) - start[self.owner]
        rank = max(1, int(count.max())) if len(count) else 1
        flat = self.owner * rank + slot
        padded = [
            put(rows, flat, self.examples * rank).view(self.examples, rank, -1) for rows in (left, right)
        ]
        return LowRank(padded[0].mT, padded[1])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is infinite or NaN. A finite sum proves it in one pass; a sum may overflow, so check again."""
    held = list(tensors)
    return bool(torch.stack([tensor.sum() for tensor in held]).isfinite().all()) or all(
        bool(tensor.isfinite().all()) for tensor in held
    )


def capture(
    model: nn.Module,
    sites: tuple[Site, ...],
    loss: Callable[[], Tensor],
    *,
    create_graph: bool = False,
    owners: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Factors]]:
    """Run ``loss`` and return its value and the factors of its gradient at every site.

    Args:
        model: the model that ``loss`` runs once on a batch.
        sites: where to capture.
        loss: runs the model and returns the loss ``[examples]`` of each example.
        create_graph: keep ``u`` and ``delta`` differentiable in the model's parameters (second order).
        owners: for sites that see packed rows ``[1, rows, d]`` (:mod:`emendo.models._packing`), the rows' examples.

    Returns:
        The losses ``[examples]``, detached, and the factors by site name. Rows whose ``u`` or ``delta`` is
        zero carry no gradient and are dropped.

    Raises:
        ModelError: the pass did not run one of the sites.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0] if create_graph else args[0].detach()
            if not output.requires_grad or not torch.is_grad_enabled():
                output = output.detach().requires_grad_()
            outputs[name] = output
            return output

        return hook

    handles = [site.module(model).register_forward_hook(keep(site.name)) for site in sites]
    try:
        with torch.enable_grad():
            losses = loss()
            if idle := [site.name for site in sites if site.name not in outputs]:
                raise ModelError(f"The model never ran {idle[0]}, so it cannot be edited; leave it out.")
            ends = [outputs[site.name] for site in sites]
            gradients = torch.autograd.grad(losses.sum(), ends, create_graph=create_graph)
    finally:
        for handle in handles:
            handle.remove()
    examples = len(losses)
    factors = {
        site.name: _rows(inputs[site.name], gradient, examples, (owners or {}).get(site.name))
        for site, gradient in zip(sites, gradients, strict=True)
    }
    return losses.detach(), factors


def _rows(u: Tensor, delta: Tensor, examples: int, owner: Tensor | None) -> Factors:
    """The rows ``[..., d]`` that carry gradient, in float32 at least; without ``owner``, examples have equal shares."""
    u, delta = u.reshape(-1, u.shape[-1]), delta.reshape(-1, delta.shape[-1])
    used = u.ne(0).any(-1) & delta.ne(0).any(-1)
    if owner is None:
        owner = torch.arange(len(u), device=u.device) // max(1, len(u) // examples)
    owner = owner.to(u.device)[used]
    dtype = torch.promote_types(u.dtype, torch.float32)
    return Factors(u[used].to(dtype), delta[used].to(dtype), owner, examples)


def move(factors: Mapping[str, Factors], device: torch.device) -> dict[str, Factors]:
    """The same factors on another device."""
    return {
        name: Factors(f.u.to(device), f.delta.to(device), f.owner.to(device), f.examples)
        for name, f in factors.items()
    }
