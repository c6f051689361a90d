"""Changes of fused experts in PEFT's form.

PEFT changes a fused parameter ``[experts, ...]`` as a whole (``target_parameters``, from PEFT 0.17 on). One pair of
matrices holds the factors of all experts::

    lora_A [experts * r, d_in]     row e * r + k is row k of the right factor of expert e
    lora_B [d_out, r * experts]    column k * experts + e is column k of the left factor of expert e

PEFT wraps the module that owns the parameter. Where several parameters of one module are changed, it wraps the module
once for each, in the module's order, so the pair of the last one has the module's name and every earlier one has
another ``.base_layer`` behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from emendo.edits._lora_config import LoraSettings
from emendo.edits.edit import check_factors
from emendo.errors import RequestError, StorageError
from emendo.low_rank import Deltas, LowRank
from emendo.models._experts import ExpertMatrix


def by_parameter(deltas: Deltas, model: nn.Module) -> dict[str, dict[int, LowRank]]:
    """The changes of experts among some changes: name of the fused parameter -> number of the expert -> its change."""
    found: dict[str, dict[int, LowRank]] = {}
    for name, delta in deltas.items():
        module = model.get_submodule(name)
        if isinstance(module, ExpertMatrix):
            owner = name.rsplit(".", 2)[0]
            found.setdefault(f"{owner}.{module.name}", {})[module.index] = delta
    return found


def fused_parameters(model: nn.Module) -> dict[str, int]:
    """Every parameter of a model whose experts are sites, and the number of its experts."""
    matrices = [(name, m) for name, m in model.named_modules() if isinstance(m, ExpertMatrix)]
    owned = {f"{name.rsplit('.', 2)[0]}.{m.name}": m for name, m in matrices}
    return {name: len(getattr(m.experts, m.name)) for name, m in owned.items()}


def selected(model: nn.Module, targets: Collection[str]) -> dict[str, list[str]]:
    """The parameters that PEFT selects by each of its ``target_parameters``: by name, or by the end of the name."""
    names = [name for name, _ in model.named_parameters()]
    return {
        target: [name for name in names if name == target or name.endswith(f".{target}")]
        for target in targets
    }


def wrappers(model: nn.Module, parameters: Collection[str]) -> dict[str, str]:
    """The parameter changed by each of PEFT's wrappers, by the wrapper's name in the adapter."""
    found: dict[str, str] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
        every = (f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters(recurse=False))
        own = [name for name in every if name in parameters]
        found |= {owner + ".base_layer" * depth: name for depth, name in enumerate(reversed(own))}
    return found


def stacked(changes: Mapping[int, LowRank], experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """``lora_A`` and ``lora_B`` of a fused parameter, each expert's factors padded with zeros to one rank."""
    (d_in, d_out), some = next((delta.shape, delta.left) for delta in changes.values())
    right, left = some.new_zeros(experts, rank, d_in), some.new_zeros(experts, d_out, rank)
    for index, delta in changes.items():
        right[index, : delta.rank], left[index, :, : delta.rank] = delta.right, delta.left
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1).contiguous()


def unstacked(a: Tensor, b: Tensor, experts: int) -> Sequence[LowRank]:
    """Each expert's change, from ``lora_A`` and ``lora_B`` of a fused parameter; the inverse of :func:`stacked`."""
    right = a.unflatten(0, (experts, -1))
    left = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return [LowRank(*factors) for factors in zip(torch.unbind(left), torch.unbind(right), strict=True)]


def check_read(name: str, delta: LowRank, where: Path) -> None:
    """Make sure that two tensors of an adapter are the factors of a change, and finite.

    Raises:
        StorageError: they are not.
    """
    try:
        check_factors(name, delta)
    except ValueError as error:
        raise StorageError(f"{where} is damaged: {error}") from error
    if not bool(delta.left.isfinite().all() and delta.right.isfinite().all()):
        raise StorageError(f"{where} cannot be used: it holds NaN or infinite numbers at {name}.")


def experts_of(
    factors: dict[str, tuple[Tensor, Tensor]], settings: LoraSettings, model: nn.Module, where: Path
) -> dict[str, LowRank]:
    """The changes of the experts in an adapter's ``target_parameters``, whose factors are taken out of ``factors``.

    Raises:
        RequestError: ``target_parameters`` selects a parameter that is no mixture of experts.
        StorageError: the factors do not fit the parameter.
    """
    known, chosen = fused_parameters(model), selected(model, settings.parameters)
    for target, names in chosen.items():
        if not names or not known.keys() >= set(names):
            raise RequestError(
                f"{where} uses target_parameters={target!r}, which names no parameter of fused experts in this model. "
                "Merge the adapter with PEFT, and use the merged model."
            )
    deltas = {}
    for wrapper, name in wrappers(model, {name for names in chosen.values() for name in names}).items():
        if wrapper not in factors:
            raise StorageError(f"{where} is damaged: it holds no factors of {name}.")
        right, left = factors.pop(wrapper)
        check_read(name, LowRank(left, right), where)
        if len(right) != known[name] * settings.rank(name):
            raise StorageError(
                f"{where} is damaged: {name} has rank {len(right)} over {known[name]} experts, its configuration gives "
                f"{settings.rank(name)} for each."
            )
        owner, _, parameter = name.rpartition(".")
        wide = torch.promote_types(left.dtype, torch.float32)
        for index, change in enumerate(unstacked(right, left, known[name])):
            if change.left.any() and change.right.any():
                deltas[f"{owner}.{index}.{parameter}"] = change.to(wide).scale(settings.scale(name))
    return deltas
