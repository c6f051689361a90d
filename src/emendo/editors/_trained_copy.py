"""A copy of a model whose parameters are trained while the model itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from emendo.models.lm import LM
from emendo.models.offloading import refuse_offloaded
from emendo.models.sites import Site
from emendo.models.text import Text, collate
from emendo.models.trunk import Trunk


class TrainedCopy(nn.Module):
    """The trained parameters of a copy of a model, and the copy.

    The state can be loaded before there is a model. Half precision becomes float32.

    Args:
        sites: where the copy is edited.
        suffix: train only the parameters of :func:`above_trunk` instead of all.

    Attributes:
        theta: the trained parameters by their names in the model, with ``/`` for dots; empty until there is a model.
    """

    def __init__(self, sites: tuple[Site, ...], *, suffix: bool) -> None:
        super().__init__()
        self.sites, self.suffix = sites, suffix
        self.theta = nn.ParameterDict()
        self._of: tuple[nn.Module, Trunk] | None = None
        self._lm: tuple[LM, LM] | None = None

    def trunk(self, model: nn.Module) -> Trunk:
        """The copy of a model, split at its first edited block; the first call copies the model's parameters."""
        if self._of is None or self._of[0] is not model:
            every = dict(model.named_parameters())
            if not self.theta:
                for name in above_trunk(model, self.sites) if self.suffix else every:
                    self.theta[name.replace(".", "/")] = nn.Parameter(_wide(every[name]).clone())
            self.to(next(iter(every.values())).device)
            own = {key.replace("/", "."): parameter for key, parameter in self.theta.items()}
            self._of = (model, Trunk(trained_copy(model, own), self.sites))
        return self._of[1]

    def lm(self, lm: LM) -> LM:
        """The copy as a language model: in eval mode every call returns the same one, with its fingerprint."""
        if self._lm is None or self._lm[0] is not lm or self.training:
            model: Any = self.trunk(lm.model).model
            self._lm = (lm, LM(model, lm.tokenizer, lm.name, lm.chat))
        return self._lm[1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Training changes the copy's fingerprint."""
        if mode:
            self._lm = None
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._lm = None
        for key, value in state_dict.items():
            name = key.removeprefix(f"{prefix}theta.")
            if name != key and name not in self.theta:
                self.theta[name] = nn.Parameter(torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def trained_copy(model: nn.Module, own: Mapping[str, nn.Parameter]) -> nn.Module:
    """A copy of the model whose parameters named in ``own`` are replaced; the others are frozen and share its memory.

    Parameters in half precision become float32, in memory of their own.

    Raises:
        RequestError: some weights of the model are offloaded.
    """
    refuse_offloaded(model, "A method that trains the model's own weights")
    parameters: dict[int, Any] = {}  # by id of the original, as deepcopy expects it
    for name, parameter in model.named_parameters():
        parameters[id(parameter)] = (
            own[name] if name in own else nn.Parameter(_wide(parameter), requires_grad=False)
        )
    return copy.deepcopy(model, parameters)


def above_trunk(model: nn.Module, sites: tuple[Site, ...]) -> list[str]:
    """The parameters that the trunk's output does not depend on, without embeddings and vocabulary projection.

    A parameter is above the trunk if it gets a gradient in a pass that resumes from the trunk's output. T5's table of
    relative positions, which the blocks below own, is used on both sides and left out.

    Args:
        model: the model; it is not changed.
        sites: the edited matrices.
    """
    own = {name: nn.Parameter(_wide(parameter)) for name, parameter in model.named_parameters()}
    apart = trained_copy(model, own)
    trunk = Trunk(apart, sites)
    batch = collate([Text((1, 0), 1, (1,) if trunk.kind == "seq2seq" else ())])  # any text will do
    with torch.enable_grad():
        logits = trunk.logits(batch, trunk.run(batch))
        gradients = torch.autograd.grad(logits.sum(), list(own.values()), allow_unused=True)
    ends = (apart.get_input_embeddings(), apart.get_output_embeddings())  # type: ignore[operator]
    words = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    below = tuple(f"{trunk.stack}.{block}." for block in range(trunk.block))
    return [
        name
        for (name, parameter), gradient in zip(own.items(), gradients, strict=True)
        if gradient is not None and id(parameter) not in words and not name.startswith(below)
    ]


def _wide(parameter: Tensor) -> Tensor:
    """The values in float32 at least; in the same memory where they are so already."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
