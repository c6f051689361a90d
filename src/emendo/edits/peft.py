"""Edits as PEFT LoRA adapters, and adapters as edits.

An edit is a LoRA: with ``dW = left @ right`` the adapter has ``lora_A = right [R, d_in]``, ``lora_B = left [d_out, R]``
and the scale ``lora_alpha / r = 1``. All matrices are padded with zeros to one rank, since some servers ignore
``rank_pattern`` and others scale it wrongly. Servers also limit the rank (vLLM to 16 by default), so an export can be
compacted; its error is stated.

An adapter is written with safetensors and JSON alone. Where PEFT is installed, the adapter is loaded back and compared
with the edit before it takes its place (:func:`prove`).
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emendo._outputs import ADAPTER
from emendo._storage import new_folder, read_tensors, write_json, write_tensors
from emendo._version import __version__
from emendo.edits._card import card_of
from emendo.edits._lora_config import LoraSettings
from emendo.edits._peft_experts import (
    by_parameter,
    check_read,
    experts_of,
    fused_parameters,
    stacked,
    unstacked,
    wrappers,
)
from emendo.edits.edit import Edit, Origin
from emendo.errors import MismatchError, ModelError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models._experts import ExpertMatrix
from emendo.models.lm import LM
from emendo.models.offloading import refuse_offloaded
from emendo.models.sites import all_sites

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
_HEADS = ("classifier", "score")  # modules that PEFT expects in the adapter of a classifier
_HUB_IDS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"
}  # the built-in model, as other tools load it
_PROMPTS = ("Water is made of hydrogen and", "The capital of France is")  # for edits without requests


@dataclass(frozen=True, slots=True)
class Adapter:
    """An exported adapter.

    Attributes:
        rank: of every matrix of the adapter.
        error: ``||dW - exported|| / ||dW||`` over all matrices together; 0 where the rank was not cut.
        logits_differ_by: the largest difference of a logit between the adapter, loaded by PEFT, and what was exported;
            None where PEFT is not installed.
    """

    rank: int
    error: float
    logits_differ_by: float | None = None


def to_peft(
    edit: Edit, lm: LM, folder: str | Path, *, max_rank: int | None = None, overwrite: bool = False
) -> Adapter:
    """Write an edit as a PEFT LoRA adapter, all or nothing; where PEFT is installed, only one that PEFT serves.

    Args:
        edit: the edit.
        lm: the model of the edit.
        folder: the adapter's folder.
        max_rank: compact every matrix to at most this rank, and pad to exactly it.
        overwrite: replace the content of the folder.

    Raises:
        MismatchError: the edit belongs to another model.
        RequestError: ``max_rank`` is not positive, or the edit holds NaN or infinite numbers.
        ModelError: PEFT does not apply the adapter as the edit is applied.
        StorageError: the folder is not empty, or cannot be written.
    """
    small, adapter = limited(edit, lm, max_rank)
    rank, error = adapter.rank, adapter.error
    notes = [f"Cut to rank {rank}: relative error {error:.2e}." if error else f"Rank {rank}, nothing cut."]
    difference = None
    with new_folder(folder, ADAPTER, overwrite=overwrite) as new:
        write_tensors(new / "adapter_model.safetensors", _tensors(small, lm, rank))
        write_json(new / "adapter_config.json", _config(small, lm, rank))
        if importlib.util.find_spec("peft") is not None:
            difference = prove(small, lm, new)
            notes.append(
                f"Loaded back with PEFT in {lm.dtype}: the logits of the answer's first token differ from the edit's "
                f"by at most {difference:.2e}."
            )
        card = card_of(edit.origin, edit.card, library="peft", notes=notes)
        (new / "README.md").write_text(card, encoding="utf-8")
        write_json(new / "emendo.json", {"version": __version__, "form": "peft"})
    return Adapter(rank, error, difference)


def limited(edit: Edit, lm: LM, max_rank: int | None) -> tuple[Edit, Adapter]:
    """An edit cut to a rank, with the rank of the adapter and the error of the cut.

    Raises:
        MismatchError: the edit belongs to another model.
        RequestError: ``max_rank`` is not positive, or the edit holds NaN or infinite numbers.
    """
    edit.check(lm)
    edit.check_numbers()
    if max_rank is not None and max_rank < 1:
        raise RequestError(f"max_rank={max_rank}: the rank of an adapter must be at least 1.")
    if max_rank is None or max_rank >= edit.rank:
        return edit, Adapter(max_rank or edit.rank, 0.0)
    small = edit.compact(rank=max_rank)
    return small, Adapter(max_rank, small.card["compacted"]["error"])


def _config(edit: Edit, lm: LM, rank: int) -> dict[str, Any]:
    fused = by_parameter(edit.deltas, lm.model)
    transposed = {site.name for site in all_sites(lm.model) if site.transposed}
    plain = [name for name in edit.deltas if not _is_expert(name, lm.model)]
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[lm.kind],
        "base_model_name_or_path": _base_name(lm.name),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": plain,
        **({"target_parameters": list(fused)} if fused else {}),
        "modules_to_save": list(_HEADS) if lm.kind == "classifier" else None,
        "fan_in_fan_out": not transposed.isdisjoint(plain),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _is_expert(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name), ExpertMatrix)


def _base_name(name: str) -> str:
    """The name by which other tools load the base model: an id on the hub, or the absolute path of a folder."""
    folder = Path(name).expanduser()
    return _HUB_IDS.get(name) or (str(folder.absolute()) if folder.exists() else name)


def _tensors(edit: Edit, lm: LM, rank: int) -> dict[str, Tensor]:
    """The tensors of an adapter; that of a classifier holds the classifier's own head too."""
    found = {}
    for name, delta in edit.deltas.items():
        if not _is_expert(name, lm.model):
            more = rank - delta.rank
            found[f"{_PREFIX}{name}{_A}"] = nn.functional.pad(delta.right, (0, 0, 0, more))
            found[f"{_PREFIX}{name}{_B}"] = nn.functional.pad(delta.left, (0, more))
    fused, experts = by_parameter(edit.deltas, lm.model), fused_parameters(lm.model)
    for wrapper, name in wrappers(lm.model, fused).items():
        a, b = stacked(fused[name], experts[name], rank)
        found |= {f"{_PREFIX}{wrapper}{_A}": a, f"{_PREFIX}{wrapper}{_B}": b}
    if lm.kind == "classifier":
        for name, module in lm.model.named_modules():
            if name.endswith(_HEADS):
                state = module.state_dict()
                found |= {f"{_PREFIX}{name}.{key}": tensor.clone() for key, tensor in state.items()}
    return found


@torch.no_grad()
def prove(edit: Edit, lm: LM, folder: str | Path, prompts: Sequence[str] | None = None) -> float:
    """Load an adapter with PEFT and compare it with an edit, in its factors and in the logits.

    Args:
        edit: the exported edit.
        lm: the model; it is not changed, since PEFT works on a copy that shares the weights.
        folder: the adapter's folder.
        prompts: where to compare the logits; by default the prompts of the edit.

    Returns:
        The largest difference of any logit of the answer's first token (of any class for a classifier).

    Raises:
        RequestError: PEFT is not installed.
        ModelError: PEFT cannot load the adapter, or does not apply it as the edit is applied.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RequestError("Proving an export needs PEFT: pip install peft") from error
    prompts = list(prompts or [request.prompt for request in edit.origin.requests] or _PROMPTS)
    clean = lm.next_logits(prompts)
    with edit.applied(lm):
        expected = lm.next_logits(prompts)
    with _sharing_copy(lm.model) as twin, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their content is checked below
        try:
            PeftModel.from_pretrained(twin, str(folder)).eval()
            wrong = _wrong_module(edit, twin)
            found = LM(twin, lm.tokenizer, lm.name, lm.chat).next_logits(prompts)
        except Exception as error:
            raise ModelError(
                _failed(edit, lm, f"PEFT cannot load it ({type(error).__name__}: {error})")
            ) from error
    if wrong is not None:
        raise ModelError(_failed(edit, lm, f"PEFT does not apply the change of {wrong}"))
    difference = float((found - expected).abs().max())
    rounding = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if not difference <= rounding + 0.02 * float((expected - clean).abs().max()):
        raise ModelError(
            _failed(edit, lm, f"its logits, loaded by PEFT, differ from the edit's by up to {difference:.2e}")
        )
    return difference


def _failed(edit: Edit, lm: LM, why: str) -> str:
    experts = (
        "The edit changes experts of a mixture, which PEFT supports from version 0.17 on. "
        if by_parameter(edit.deltas, lm.model)
        else ""
    )
    return (
        f"This edit cannot be exported as a PEFT adapter: {why}. {experts}Nothing was written. A checkpoint with the "
        "edit merged in works with any software: emendo export --to merged, or emendo.edits.to_merged."
    )


@contextmanager
def _sharing_copy(model: Any) -> Iterator[Any]:
    """A copy of a model's modules that shares all of its tensors; their ``requires_grad`` is restored afterwards."""
    refuse_offloaded(model, "Exporting a PEFT adapter")
    tensors = [*model.parameters(), *model.buffers()]
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        yield copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)


def _wrong_module(edit: Edit, model: nn.Module) -> str | None:
    """The first module at which the adapter that PEFT has put into a model is not the edit; None if all are right."""
    found: dict[str, LowRank] = {}
    for name, module in model.named_modules():
        if isinstance(factors := getattr(module, "lora_A", None), nn.ModuleDict) and "default" in factors:
            layer: Any = module
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scale = layer.scaling["default"]
            parameter = getattr(layer, "parameter_name", None)
            if parameter is None:
                found[name] = LowRank(b, a).scale(scale)
                continue
            owner = name.replace(".base_layer", "")
            for index, change in enumerate(unstacked(a, b, layer.num_experts)):
                found[f"{owner}.{index}.{parameter}"] = change.scale(scale)
    names: dict[str, None] = dict.fromkeys([*edit.deltas, *found])
    for name in names:
        expected, actual = edit.deltas.get(name), found.get(name)
        size = float(expected.norm()) if expected else 0.0
        if expected and actual:
            wide = torch.promote_types(expected.left.dtype, torch.float32)
            actual = expected.to(wide) + actual.to(expected.left.device).to(wide).scale(-1.0)
            if not float(actual.norm()) <= 1e-3 * size:
                return name
        elif size or (actual and float(actual.norm())):
            return name
    return None


def from_peft(folder: str | Path, lm: LM) -> Edit:
    """Read a PEFT LoRA adapter as an edit that has the effect of the adapter.

    Args:
        folder: the adapter's folder.
        lm: the model of the adapter.

    Raises:
        StorageError: a file is missing or damaged, or the tensors do not fit the configuration.
        RequestError: the adapter does more than add low-rank changes to weight matrices.
        MismatchError: the adapter does not fit the model's matrices.
    """
    where = Path(folder).expanduser()
    settings = LoraSettings.read(where)
    file = where / "adapter_model.safetensors"
    if not file.exists() and (where / "adapter_model.bin").exists():
        raise StorageError(
            f"{where} holds its tensors in adapter_model.bin, a pickle, which can run code and is not read. Save the "
            "adapter as safetensors: load it with PEFT, and call save_pretrained."
        )
    tensors = read_tensors(file)
    factors = _factors(tensors, lm.model, where)
    sites = {site.name: site for site in all_sites(lm.model)}
    deltas = experts_of(factors, settings, lm.model, where)
    for name, (right, left) in factors.items():
        if name not in sites:
            raise MismatchError(f"{lm.name} has no matrix {name!r}, which the adapter in {where} changes.")
        check_read(name, LowRank(left, right), where)
        if len(right) != settings.rank(name):
            raise StorageError(
                f"{where} is damaged: {name} has rank {len(right)}, its configuration gives {settings.rank(name)}."
            )
        if not settings.targets(name, lm.model):
            raise RequestError(
                f"{where} holds factors for {name}, but its configuration does not select that module, so PEFT would "
                "ignore them."
            )
        delta = LowRank(left, right).to(torch.promote_types(left.dtype, torch.float32))
        deltas[name] = delta.scale(settings.scale(name))
    origin = Origin(
        fingerprint=lm.fingerprint,
        model=lm.name,
        editor="lora-adapter",
        settings={
            "adapter": str(folder),
            "r": settings.values["r"],
            "lora_alpha": settings.values["lora_alpha"],
        },
        requests=(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    edit = Edit(deltas, origin)
    edit.check(lm)
    return edit


def _factors(
    tensors: Mapping[str, Tensor], model: nn.Module, where: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """``lora_A`` and ``lora_B`` by module name.

    Raises:
        StorageError: a factor has no counterpart, or there are none.
        RequestError: there are other tensors, which are not the model's own.
    """
    found: dict[str, dict[str, Tensor]] = {}
    own = model.state_dict()
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        ending = next((ending for ending in (_A, _B) if name.endswith(ending)), None)
        if key.startswith(_PREFIX) and ending is not None:
            found.setdefault(name.removesuffix(ending), {})[ending] = tensor
            continue
        base = own.get(name)  # such as the head of a classifier, which is saved unless it was trained
        if base is None or base.shape != tensor.shape or not torch.equal(tensor.to(base), base):
            raise RequestError(
                f"{where} holds {key!r}, which is neither lora_A nor lora_B of a module below {_PREFIX!r}, nor equal "
                "to a weight of the model. Only low-rank changes of weight matrices can be imported."
            )
    if not found:
        raise StorageError(f"{where} is damaged: its adapter_model.safetensors holds no lora_A and lora_B.")
    if odd := [name for name, pair in found.items() if len(pair) < 2]:
        raise StorageError(f"{where} is damaged: {odd[0]} has only one of lora_A and lora_B.")
    return {name: (pair[_A], pair[_B]) for name, pair in found.items()}
