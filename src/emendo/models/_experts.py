"""Experts of a mixture whose weights are fused into 3-D parameters, as matrices that can be edited one by one.

transformers keeps the experts of a block as ``gate_up_proj [experts, ...]`` and ``down_proj [experts, ...]`` and
multiplies them in one kernel. :func:`open_experts` adds a module for each expert's matrix, which owns no parameter: its
weight is a view. As soon as such a module has a hook (an edit, a capture), the mixture runs expert by expert through
these modules; without hooks it runs as before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emendo.models.offloading import is_offloaded, weight_of


class ExpertMatrix(nn.Module):
    """One expert's matrix.

    Args:
        experts: the module that owns the fused parameter.
        name: name of the parameter there.
        index: number of the expert.

    Attributes:
        rows: while the mixture runs, the tokens ``[rows]`` that are routed to the expert, and the number of all tokens.
    """

    experts: Any

    def __init__(self, experts: nn.Module, name: str, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "experts", experts)  # not registered: it is the parent, no child
        self.name, self.index = name, index
        self.rows: tuple[Tensor, int] | None = None

    @property
    def weight(self) -> Tensor:
        """``[d_out, d_in]``, or ``[d_in, d_out]`` where the mixture stores it transposed; a view."""
        return weight_of(self.experts, self.name)[self.index]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as ``[d_in, d_out]``."""
        return bool(self.experts.is_transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        first, second = getattr(self.experts, self.name).shape[1:]
        return (first, second) if self.transposed else (second, first)

    def forward(self, x: Tensor) -> Tensor:
        """``x [rows, d_in]`` to ``[rows, d_out]``."""
        bias = getattr(self.experts, f"{self.name}_bias")[self.index] if self.experts.has_bias else None
        return nn.functional.linear(x, self.weight.mT if self.transposed else self.weight, bias)


def open_experts(model: nn.Module) -> None:
    """Add a module for every matrix of every fused expert of a model; calling it again does nothing."""
    for experts in list(model.modules()):
        names = _parameters(experts)
        if not names or "0" in experts._modules:
            continue
        for index in range(len(getattr(experts, names[0]))):
            experts.add_module(
                str(index), nn.ModuleDict({name: ExpertMatrix(experts, name, index) for name in names})
            )
        run = (
            "_old_forward" if is_offloaded(experts) else "forward"
        )  # the first runs once the weights are there
        setattr(experts, run, partial(_forward, experts))


def _parameters(module: nn.Module) -> list[str]:
    """Names of the fused parameters of a mixture of transformers' own form; empty for any other module."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    fused = [getattr(module, name, None) for name in names]
    return names if all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in fused) else []


def _forward(experts: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    hooked = any(
        matrix._forward_hooks or matrix._forward_pre_hooks
        for index in range(len(experts.down_proj))
        for matrix in experts._modules[str(index)].children()
    )
    if not hooked:
        return type(experts).forward(experts, hidden_states, *args, **kwargs)
    index, weights = [*args, *kwargs.values()][:2]
    return _by_expert(experts, hidden_states, index, weights)


def _by_expert(experts: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The mixture, expert by expert.

    Args:
        experts: the module that owns the fused parameters.
        hidden_states: ``[tokens, width]``.
        index: ``[tokens, k]`` the experts of each token; a number that is no expert stands for none.
        weights: ``[tokens, k]`` their weights.
    """
    total = torch.zeros_like(hidden_states)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for number in index.unique().tolist():
        if not 0 <= number < len(experts.down_proj):
            continue
        token, place = torch.where(index == number)
        up, down = experts._modules[str(number)][first], experts._modules[str(number)]["down_proj"]
        up.rows = down.rows = (token, len(hidden_states))
        try:
            inner = up(hidden_states.index_select(0, token))
            found = down(experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner))
        finally:
            up.rows = down.rows = None
        if experts.has_post_expert_norm:
            found = experts.post_expert_norm(found)
        weighted = found * weights[token, place, None]
        total = total.index_add(0, token, weighted.to(total.dtype))
    return total
