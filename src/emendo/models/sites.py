"""Where a model can be edited: its weight matrices, found by structure.

Nothing here looks at a model's name. A *stack* is a ``ModuleList`` of alike blocks, each holding weight
matrices; a *site* is one such matrix. A matrix below a module whose class is an attention class belongs
to attention, every other one to the MLP.

This is the only file that knows that GPT-2's ``Conv1D`` stores its weight as ``[d_in, d_out]`` where
``nn.Linear`` stores ``[d_out, d_in]``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emendo.errors import ModelError

Kind = Literal["causal", "seq2seq", "classifier"]
"""A decoder that continues texts, an encoder-decoder, or a classifier of texts."""


def kind_of(model: nn.Module) -> Kind:
    """What kind of model it is, from its config and structure.

    Raises:
        ModelError: neither words nor classes can be read from its output.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return "seq2seq" if encodes else "causal"
    if hasattr(model, "num_labels"):
        return "classifier"
    raise ModelError(
        f"{type(model).__name__} has no vocabulary projection and no classes, so the probability of a target cannot "
        "be read from it. Load it as a causal language model, as an encoder-decoder, or as a sequence classifier on "
        "one stack of blocks."
    )


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of alike blocks: its dotted name in the model and how many blocks it has."""

    name: str
    depth: int


@dataclass(frozen=True, slots=True)
class Site:
    """One editable weight matrix, mapping ``d_in`` features to ``d_out``.

    Attributes:
        name: dotted name of the module that holds the weight.
        d_in: number of input features (m in the MEND paper).
        d_out: number of output features (n in the MEND paper).
        stack: dotted name of the stack of blocks the module stands in.
        block: index of its block in that stack.
        attention: whether it belongs to the attention part of the block.
        transposed: whether the module stores its weight as ``[d_in, d_out]``.
    """

    name: str
    d_in: int
    d_out: int
    stack: str
    block: int
    attention: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``: the key by which editors share networks."""
        return (self.d_in, self.d_out)

    def module(self, model: nn.Module) -> nn.Module:
        """The module of ``model`` that holds this site's weight."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """The weight as ``[d_out, d_in]``, a view of the module's own tensor."""
        weight = self.module(model).weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight


def group_sites(sites: Sequence[Site], *, shared: bool) -> dict[str, list[int]]:
    """Which matrices share what an editor learns: all of one shape or, unless ``shared``, none.

    Returns:
        A name for each group, and the indices of its matrices in ``sites``.
    """
    groups: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        groups.setdefault(f"{site.d_in}x{site.d_out}" if shared else str(index), []).append(index)
    return groups


def _matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` where the module is a weight matrix, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return d_in, d_out
    return None


def is_matrix(module: nn.Module) -> bool:
    """Whether the module is a weight matrix."""
    return _matrix_shape(module) is not None


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks of blocks: outermost ``ModuleList``s of one class whose members hold matrices.

    Raises:
        ModelError: the model has no such list.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(stack.name + ".") for stack in stacks):
            continue
        alike = len({type(block) for block in module}) == 1
        if alike and any(_matrix_shape(m) for m in module[0].modules()):
            stacks.append(Stack(name, len(module)))
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no stack of blocks (a ModuleList of alike modules that hold Linear "
            "or Conv1D matrices), so there is nothing to edit."
        )
    return stacks


def all_sites(model: nn.Module) -> list[Site]:
    """Every weight matrix in every block of every stack, in the model's order."""
    sites = []
    for stack in find_stacks(model):
        blocks = model.get_submodule(stack.name)
        for index, block in enumerate(blocks.children()):
            attention: list[str] = []
            for name, module in block.named_modules():
                kind = type(module).__name__.lower()
                if name and ("attention" in kind or "attn" in kind):
                    attention.append(name + ".")
                if shape := _matrix_shape(module):
                    sites.append(
                        Site(
                            name=f"{stack.name}.{index}.{name}",
                            d_in=shape[0],
                            d_out=shape[1],
                            stack=stack.name,
                            block=index,
                            attention=name.startswith(tuple(attention)),
                            transposed=isinstance(module, Conv1D),
                        )
                    )
    return sites


def find_sites(
    model: nn.Module,
    which: str | Sequence[str] = "mlp",
    *,
    last: int | None = None,
    blocks: Sequence[int] | None = None,
) -> tuple[Site, ...]:
    """Choose the weight matrices to edit.

    Args:
        model: any model whose blocks stand in a ``ModuleList``.
        which: ``"mlp"`` (the default), ``"attention"``, ``"all"``, or one or more glob patterns over dotted
            module names, such as ``"*.layers.2?.mlp.down_proj"``.
        last: take the last so many blocks of each stack. By default 3, or 2 where the model has an encoder
            and a decoder (MEND, footnote 3); with a pattern, all blocks.
        blocks: block indices instead of ``last``; negative ones count from the end.

    Returns:
        The sites in the model's order.

    Raises:
        ModelError: there is no such block, or nothing matches.
    """
    stacks = {stack.name: stack for stack in find_stacks(model)}
    patterns = None if isinstance(which, str) and which in ("mlp", "attention", "all") else which
    if isinstance(patterns, str):
        patterns = [patterns]
    if last is None and blocks is None and patterns is None:
        last = 3 if len(stacks) == 1 else 2
    if last is not None and last < 1:
        raise ModelError(f"last={last}: the number of blocks to edit must be at least 1.")
    deepest = max(stack.depth for stack in stacks.values())
    if blocks is not None and (absent := [b for b in blocks if not -deepest <= b < deepest]):
        raise ModelError(
            f"There is no block {absent[0]}: the model has {deepest} blocks, 0 to {deepest - 1}."
        )

    def wanted(site: Site) -> bool:
        depth = stacks[site.stack].depth
        if blocks is not None and site.block not in {b % depth for b in blocks if -depth <= b < depth}:
            return False
        if last is not None and blocks is None and site.block < depth - last:
            return False
        if patterns is not None:
            return any(fnmatch.fnmatchcase(site.name, pattern) for pattern in patterns)
        return which == "all" or site.attention == (which == "attention")

    found = all_sites(model)
    chosen = tuple(site for site in found if wanted(site))
    if not chosen:
        names = sorted({site.name for site in found if site.block == stacks[site.stack].depth - 1})
        raise ModelError(
            f"No weight matrix matches {which!r}"
            + (f" in blocks {list(blocks)}" if blocks is not None else "")
            + f". The last block has: {', '.join(names)}."
        )
    return chosen
