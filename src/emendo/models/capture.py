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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emendo.errors import ModelError
from emendo.low_rank import LowRank
from emendo.models._experts import ExpertMatrix
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
        share: ``[rows]`` the share of each row in a change; None where all are whole.
    """

    u: Tensor
    delta: Tensor
    owner: Tensor
    examples: int
    share: Tensor | None = None

    def rows(self, index: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``u``, ``delta``, ``owner`` and ``share`` of some rows."""
        share = None if self.share is None else self.share[index]
        return self.u[index], self.delta[index], self.owner[index], share

    @classmethod
    def empty(cls, d_in: int, d_out: int) -> Factors:
        """The factors of no text."""
        return cls(torch.zeros(0, d_in), torch.zeros(0, d_out), torch.zeros(0, dtype=torch.int64), 0)

    @classmethod
    def concatenate(cls, parts: Sequence[Factors], examples: int) -> Factors:
        """The rows of several parts, sorted by their examples."""
        owner, order = torch.cat([part.owner for part in parts]).sort(stable=True)
        shares = [part.share for part in parts if part.share is not None]
        return cls(
            torch.cat([part.u for part in parts])[order],
            torch.cat([part.delta for part in parts])[order],
            owner,
            examples,
            torch.cat(shares)[order] if shares else None,
        )

    def lowrank(self, left: Tensor, right: Tensor) -> LowRank:
        """Turn rows into one change for each example, ``sum_i share_i left_i right_i^T`` over the example's rows.

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
        if self.share is not None:
            left = left * self.share[:, None]
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
    shares: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Factors]]:
    """Run ``loss`` and return its value and the factors of its gradient at every site.

    Args:
        model: the model that ``loss`` runs once on a batch.
        sites: where to capture.
        loss: runs the model and returns the loss ``[examples]`` of each example.
        create_graph: keep ``u`` and ``delta`` differentiable in the model's parameters (second order).
        owners: for sites that see packed rows ``[1, rows, d]`` (:mod:`emendo.models._packing`), the rows' examples.
        shares: by site, the share of every row in a change; an expert's are those of all tokens.

    Returns:
        The losses ``[examples]``, detached, and the factors by site name. Rows whose ``u`` or ``delta`` is
        zero carry no gradient and are dropped.

    Raises:
        ModelError: the pass did not run one of the sites, or its loss does not depend on it.
    """
    calls: list[_Call] = []

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad or not torch.is_grad_enabled():
                output = output.detach().requires_grad_()
            u = args[0] if create_graph else args[0].detach()
            calls.append(_Call(name, u, output, getattr(module, "rows", None)))
            return output

        return hook

    handles = [site.module(model).register_forward_hook(keep(site.name)) for site in sites]
    try:
        with torch.enable_grad():
            losses = loss()
            ran = {call.name for call in calls}
            idle = [site for site in sites if site.name not in ran]
            if never := [site.name for site in idle if not isinstance(site.module(model), ExpertMatrix)]:
                raise ModelError(f"The model never ran {never[0]}, so it cannot be edited; leave it out.")
            if not losses.requires_grad:
                raise ModelError(
                    f"{type(model).__name__} computes its blocks without a gradient for their matrices, so it cannot "
                    "be edited."
                )
            ends = [call.output for call in calls]
            gradients = torch.autograd.grad(losses.sum(), ends, create_graph=create_graph, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    examples = len(losses)
    found: dict[str, list[Factors]] = {site.name: [] for site in sites}
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is None:  # this call is not differentiated, or its output is not used
            continue
        owner, share = (owners or {}).get(call.name), (shares or {}).get(call.name)
        if call.routed is not None:
            token, tokens = call.routed
            owner = token // (tokens // examples)
            share = None if share is None else share.to(token.device)[token]
        found[call.name].append(_rows(call.u, gradient, examples, owner, share))
    for site in idle:  # an expert that no token was routed to
        weight = site.weight(model)
        found[site.name].append(
            _rows(weight.new_zeros(0, site.d_in), weight.new_zeros(0, site.d_out), examples, None)
        )
    if unused := [name for name, own in found.items() if not own]:
        raise ModelError(f"{unused[0]} does not influence the answer, so it cannot be edited; leave it out.")
    return losses.detach(), {name: _joined(own) for name, own in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of a site's module: its input and output, and for an expert the tokens routed to it, of how many."""

    name: str
    u: Tensor
    output: Tensor
    routed: tuple[Tensor, int] | None


def _joined(calls: list[Factors]) -> Factors:
    """The rows of all calls of one site; a block that is shared runs several times in a pass."""
    if len(calls) == 1:
        return calls[0]
    return Factors.concatenate(calls, calls[0].examples)


def _rows(
    u: Tensor, delta: Tensor, examples: int, owner: Tensor | None, share: Tensor | None = None
) -> Factors:
    """The rows ``[..., d]`` that carry gradient, in float32 at least; without ``owner``, examples have equal shares."""
    u, delta = u.reshape(-1, u.shape[-1]), delta.reshape(-1, delta.shape[-1])
    if owner is None and len(u) % examples:
        raise ModelError(
            f"A matrix saw {len(u)} rows in a pass over {examples} texts, so their texts are unknown; leave it out."
        )
    used = u.ne(0).any(-1) & delta.ne(0).any(-1)
    if owner is None:
        owner = torch.arange(len(u), device=u.device) // max(1, len(u) // examples)
    owner = owner.to(u.device)[used]
    dtype = torch.promote_types(u.dtype, torch.float32)
    share = None if share is None else share.to(u.device, dtype)[used]
    return Factors(u[used].to(dtype), delta[used].to(dtype), owner, examples, share)


def move(factors: Mapping[str, Factors], device: torch.device) -> dict[str, Factors]:
    """The same factors on another device."""
    return {
        name: Factors(
            f.u.to(device),
            f.delta.to(device),
            f.owner.to(device),
            f.examples,
            None if f.share is None else f.share.to(device),
        )
        for name, f in factors.items()
    }
