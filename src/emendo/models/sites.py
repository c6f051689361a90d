"""Where a model can be edited: its weight matrices, found by structure.

Nothing here depends on a model's name. A *stack* is a ``ModuleList`` of blocks that all hold weight matrices; a *site*
is one such matrix. A matrix below a module whose class is an attention class belongs to attention, every other one to
the MLP. The fused experts of a mixture count one by one
(:mod:`emendo.models._experts`). Matrices that choose experts (routers), gates with a single output, and experts in a
list of modules are no sites.

This is the only module that knows that GPT-2's ``Conv1D`` stores its weight as ``[d_in, d_out]`` where ``nn.Linear``
stores ``[d_out, d_in]``.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emendo.errors import ModelError
from emendo.models._experts import ExpertMatrix
from emendo.models.offloading import device_of, weight_of

Kind = Literal["causal", "seq2seq", "classifier"]
"""A decoder, an encoder-decoder, or a sequence classifier."""


def kind_of(model: nn.Module) -> Kind:
    """The kind of a model, from its config and structure.

    Raises:
        ModelError: its output has neither a vocabulary nor classes.
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


def token_embeddings(model: nn.Module) -> nn.Module:
    """The table of token embeddings.

    Raises:
        ModelError: the model has none; Perceiver reads bytes through a parameter, CANINE through hashes.
    """
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        table = None
    if not isinstance(table, nn.Module) or not isinstance(getattr(table, "weight", None), Tensor):
        raise ModelError(f"{type(model).__name__} has no table of token embeddings, so it cannot be edited.")
    return table


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model looks up its tokens."""
    return device_of(token_embeddings(model))


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks: its dotted name in the model, and its number of blocks."""

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
        """``(d_in, d_out)``; an editor shares its networks among the sites of one shape."""
        return (self.d_in, self.d_out)

    def module(self, model: nn.Module) -> nn.Module:
        """The module that holds this site's weight."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """The weight as ``[d_out, d_in]``: a view of the module's tensor, or of one just read if it is offloaded."""
        weight = weight_of(self.module(model))
        return weight.T if self.transposed else weight


def group_sites(sites: Sequence[Site], *, shared: bool) -> dict[str, list[int]]:
    """Group the matrices that share an editor's parameters.

    Args:
        sites: the matrices.
        shared: whether matrices of one shape share parameters; otherwise each is a group of its own.

    Returns:
        Name of the group -> the indices of its matrices in ``sites``.
    """
    groups: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        groups.setdefault(f"{site.d_in}x{site.d_out}" if shared else str(index), []).append(index)
    return groups


def _matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a weight matrix, None for another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return d_in, d_out
    if isinstance(module, ExpertMatrix):
        return module.shape
    return None


def is_matrix(module: nn.Module) -> bool:
    """Whether the module is a weight matrix."""
    return _matrix_shape(module) is not None


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of blocks that read text: one, or the encoder's and the decoder's.

    Candidates are the outermost ``ModuleList``s whose members all hold weight matrices. Of several, those of the
    language part count (a multimodal model has others): the ones beside the token embeddings, with as many blocks as
    the config says.

    Raises:
        ModelError: the model has no such list, or no token embeddings.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(stack.name + ".") for stack in found):
            continue
        if all(any(_matrix_shape(m) for m in block.modules()) for block in module):
            found.append(Stack(name, len(module)))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no stack of blocks (a ModuleList whose members all hold Linear or Conv1D "
            "matrices), so there is nothing to edit."
        )
    return _language_stacks(model, found)


def _language_stacks(model: nn.Module, stacks: list[Stack]) -> list[Stack]:
    """The stacks of the language part; all of them where that cannot be decided.

    Raises:
        ModelError: the model reads no tokens.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return _encoder_decoder(model, stacks) if len(stacks) > 2 else stacks
    if len(stacks) == 1 or config is None:
        return stacks
    text = config.get_text_config(decoder=True)
    table = _name_of(model, token_embeddings(model))
    near = min(_distance(table, stack.name) for stack in stacks)
    chosen = [stack for stack in stacks if _distance(table, stack.name) == near]
    depth = getattr(text, "num_hidden_layers", None)
    return [stack for stack in chosen if stack.depth == depth] or chosen


def _encoder_decoder(model: nn.Module, stacks: list[Stack]) -> list[Stack]:
    """The deepest stack of the encoder and that of the decoder."""
    chosen = []
    for part in ("get_encoder", "get_decoder"):
        below = _name_of(model, getattr(model, part)()) + "."
        own = [stack for stack in stacks if stack.name.startswith(below)]
        chosen += [max(own, key=lambda stack: stack.depth)] if own else []
    return chosen if len(chosen) == 2 else stacks


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def _distance(a: str, b: str) -> int:
    """Steps between two modules in the tree of modules, by their dotted names."""
    one, other = a.split("."), b.split(".")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return len(one) + len(other) - 2 * shared


def all_sites(model: nn.Module) -> list[Site]:
    """Every weight matrix in every block of every stack, in the model's order, each once; no routers and no gates."""
    sites = []
    known = set()
    for stack in find_stacks(model):
        blocks = model.get_submodule(stack.name)
        for index, block in enumerate(blocks.children()):
            attention: list[str] = []
            excluded = _routers(block) | _listed_experts(block)
            for name, module in block.named_modules():
                kind = type(module).__name__.lower()
                if name and ("attention" in kind or "attn" in kind):
                    attention.append(name + ".")
                shape = _matrix_shape(module)
                if shape is not None and name not in excluded and id(module) not in known:
                    known.add(id(module))
                    sites.append(
                        Site(
                            name=f"{stack.name}.{index}.{name}".rstrip("."),
                            d_in=shape[0],
                            d_out=shape[1],
                            stack=stack.name,
                            block=index,
                            attention=name.startswith(tuple(attention)),
                            transposed=isinstance(module, Conv1D)
                            or (isinstance(module, ExpertMatrix) and module.transposed),
                        )
                    )
    return sites


def _routers(block: nn.Module) -> set[str]:
    """Names of the matrices in a block that choose experts, or gate with a single output.

    A router stands beside its experts and has one output for each of them, or its class is a router class; if it has
    several layers, all belong to it.
    """
    found = {name for name, m in block.named_modules() if (_matrix_shape(m) or (0, 0))[1] == 1}
    for name, experts in block.named_modules():
        if "router" in type(experts).__name__.lower():
            found |= {
                f"{name}.{inner}".rstrip(".") for inner, m in experts.named_modules() if _matrix_shape(m)
            }
        if not (count := _experts(experts)):
            continue
        mixture = name.rpartition(".")[0]
        for child, module in block.get_submodule(mixture).named_children():
            path = f"{mixture}.{child}" if mixture else child
            matrices = {inner: s for inner, m in module.named_modules() if (s := _matrix_shape(m))}
            if path != name and any(d_out == count for _, d_out in matrices.values()):
                found |= {f"{path}.{inner}".rstrip(".") for inner in matrices}
    return found


def _listed_experts(block: nn.Module) -> set[str]:
    """Names of the matrices in lists of experts, which see routed rows without saying of which tokens."""
    found: set[str] = set()
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and _experts(module) > 1:
            found |= {
                f"{name}.{inner}"
                for inner, m in module.named_modules()
                if "expert" in name.lower() and _matrix_shape(m) and not isinstance(m, ExpertMatrix)
            }
    return found


def _experts(module: nn.Module) -> int:
    """Number of experts in a module: list members that hold matrices, or entries of 3-D parameters; 0 for others."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        members = [member for member in module.children() if any(map(_matrix_shape, member.modules()))]
        alike = len({type(member) for member in members}) == 1 and len(members) > 1
        return len(members) if alike and _matrix_shape(members[0]) is None else 0
    fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    several = len(fused) > 1 or (fused and "expert" in type(module).__name__.lower())
    return len(fused[0]) if several and len({len(p) for p in fused}) == 1 else 0


def find_sites(
    model: nn.Module,
    which: str | Sequence[str] = "mlp",
    *,
    last: int | None = None,
    blocks: Sequence[int] | None = None,
) -> tuple[Site, ...]:
    """Choose the weight matrices to edit.

    Unless patterns name the matrices, a short text is run to leave out those whose module the model never calls.

    Args:
        model: any model whose blocks are in a ``ModuleList``.
        which: ``"mlp"`` (the default), ``"attention"``, ``"all"``, or one or more glob patterns over dotted
            module names, such as ``"*.layers.2?.mlp.down_proj"``.
        last: the number of blocks to edit, from the end of each stack. By default 3, or 2 where the model has an
            encoder and a decoder (MEND, footnote 3); with a pattern, all blocks.
        blocks: block indices instead of ``last``; negative ones count from the end.

    Returns:
        The sites in the model's order.

    Raises:
        ModelError: there is no such block, or nothing matches, or nothing matches one of the patterns.
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
    if chosen and patterns is None:
        chosen = _that_run(model, chosen) or chosen
    unmatched = [p for p in patterns or () if not any(fnmatch.fnmatchcase(site.name, p) for site in chosen)]
    if chosen and not unmatched:
        return chosen
    names = sorted({site.name for site in found if site.block == stacks[site.stack].depth - 1})
    where = f" in blocks {list(blocks)}" if blocks is not None else ""
    message = f"No weight matrix matches {unmatched or which!r}{where}."
    if fused := _fused_experts(model, list(stacks)):
        message += (
            f" The experts of this mixture are fused into one tensor ({fused}) in a form that cannot be edited: choose "
            "attention, or a pattern."
        )
    raise ModelError(f"{message} The last block has: {', '.join(names)}.")


def _fused_experts(model: nn.Module, stacks: Sequence[str]) -> str:
    """Name of the last module in the stacks that holds its experts' weights as 3-D parameters; empty if none does."""
    names = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) and _experts(module)
    ]
    return next((name for name in reversed(names) if name.startswith(tuple(f"{s}." for s in stacks))), "")


@torch.no_grad()
def _that_run(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites whose module maps one tensor to one tensor in a pass over a short text.

    Some blocks use a matrix's weight without calling its module (Mamba's ``dt_proj``), so a hook there has no effect.
    An expert that this text is not routed to may run for another text, so it counts. Where the model cannot run as it
    is (on the meta device, say), all sites are returned.
    """
    ran: set[str] = set()

    def seen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                ran.add(name)

        return hook

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module(model).register_forward_hook(seen(site.name)).remove)
        try:
            ids: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3, 4]], device=input_device(model))}
            if "use_cache" in inspect.signature(model.forward).parameters:
                ids["use_cache"] = False
            if kind_of(model) == "seq2seq":
                ids["decoder_input_ids"] = ids["input_ids"]
            model(**ids)
        except Exception:  # noqa: BLE001 - the pass that edits the model states the reason
            return tuple(sites)
    inside = tuple(f"{name}." for name in {site.stack for site in sites})
    blocks = {(site.stack, site.block) for site in sites if site.name in ran}
    experts = tuple(
        f"{name}." for name, m in model.named_modules() if name.startswith(inside) and _experts(m)
    )
    return tuple(
        site
        for site in sites
        if site.name in ran or ((site.stack, site.block) in blocks and site.name.startswith(experts))
    )
