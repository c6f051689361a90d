"""Estimates of the memory that training and editing take, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emendo.editors import Editor
from emendo.models.sites import Site, find_stacks
from emendo.train import TrainConfig

_FLOAT = 4  # bytes
_TOKENS = 400  # tokens in a micro-batch of a training step
_LABELS = 150  # positions of these whose logits are needed
_ROWS = 12  # tokens of an edit
_BASE = 400 * 2**20  # Python and its libraries

HOW = (
    "This is an estimate, accurate to about a third. Training holds the model's weights, five numbers for each of the "
    "editor's parameters (its value, its gradient, two of Adam's, the best so far) and, for a batch of "
    f"{TrainConfig().batch} edits of {_ROWS} tokens, the activations of the edited blocks and of the editor and the "
    "logits of the answers. Editing holds the weights and the editor. Both include "
    f"{_BASE // 2**20} MB for Python and its libraries. The outputs of the frozen blocks are on disk and not included."
)


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory in bytes, by purpose.

    Attributes:
        parameters: number of parameters of the editor.
        training: part -> bytes.
        editing: part -> bytes.
    """

    parameters: int
    training: dict[str, int]
    editing: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """As `emendo sites --json` prints it, in bytes."""
        return {
            name: {**parts, "total": sum(parts.values())}
            for name, parts in (("training", self.training), ("editing", self.editing))
        } | {"how": HOW}


def estimate(model: nn.Module, kind: type[Editor], config: Any, sites: Sequence[Site]) -> Needs:
    """The memory that an editor with these settings needs.

    Args:
        model: the loaded model.
        kind: the editor's class.
        config: the editor's settings.
        sites: the matrices it edits.
    """
    with torch.device("meta"):
        editor = kind(tuple(sites), config)
    parameters = sum(p.numel() for p in editor.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Needs(
        parameters,
        {
            "libraries": _BASE,
            "model": weights,
            "editor": parameters * _FLOAT * 5,
            "activations": _activations(model, sites),
        },
        {"libraries": _BASE, "model": weights, "editor": parameters * _FLOAT},
    )


def _activations(model: nn.Module, sites: Sequence[Site]) -> int:
    """The memory that a training step keeps for its backward pass."""
    depth = {stack.name: stack.depth for stack in find_stacks(model)}
    edited = sum(
        depth[name] - min(s.block for s in sites if s.stack == name) for name in {s.stack for s in sites}
    )
    vocabulary, width = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    widths = sum(site.d_in + site.d_out for site in sites)
    blocks = _TOKENS * (edited * 16 * width + 2 * widths)
    logits = 5 * _LABELS * vocabulary  # edited ones twice, the reference, log-probabilities, gradients
    rows = TrainConfig().batch * _ROWS * widths * 10  # the editor's layers, the changes and their gradients
    return _FLOAT * int(blocks + logits + rows)
