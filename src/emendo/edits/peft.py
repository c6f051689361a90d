"""Edits as PEFT LoRA adapters and as merged checkpoints, and adapters as edits.

An edit *is* a LoRA: with ``dW = left @ right`` the adapter has ``lora_A = right [R, d_in]`` and ``lora_B = left
[d_out, R]`` and the scale ``lora_alpha / r = 1``. All matrices are padded with zeros to one rank, since a
``rank_pattern`` is dropped by some servers and wrong by others' scale. Serving frameworks cap the rank (vLLM: 16 by
default), so an export can be compacted; the error is stated.

An adapter is written with safetensors and JSON alone; PEFT itself is only needed to prove it (:func:`prove`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emendo._storage import new_folder, read_json, read_tensors, write_json, write_tensors
from emendo._version import __version__
from emendo.edits._card import card_of
from emendo.edits._weights import Merged, merge
from emendo.edits.edit import Edit, Origin
from emendo.errors import ModelError, RequestError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import Site, all_sites

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
_PLAIN: Mapping[
    str, tuple[Any, ...]
] = {  # what else a config may say without changing what the adapter computes
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """What was exported.

    Attributes:
        rank: of every matrix of the adapter.
        error: ``||dW - exported|| / ||dW||`` over all matrices together; 0 where nothing was cut.
    """

    rank: int
    error: float


def to_peft(
    edit: Edit, lm: LM, folder: str | Path, *, max_rank: int | None = None, overwrite: bool = False
) -> Adapter:
    """Write an edit as a PEFT LoRA adapter.

    Args:
        edit: the edit.
        lm: the model that it was made for.
        folder: where the adapter shall be.
        max_rank: compact every matrix to at most this rank, and pad to exactly it.
        overwrite: replace what is there.

    Raises:
        MismatchError: the edit was made for another model.
        RequestError: ``max_rank`` is not positive.
        StorageError: the folder already holds something, or cannot be written.
    """
    edit.check(lm)
    if max_rank is not None and max_rank < 1:
        raise RequestError(f"max_rank={max_rank}: the rank of an adapter must be at least 1.")
    sites = _sites(lm, edit.deltas)
    small, error = edit, 0.0
    if max_rank is not None and max_rank < edit.rank:
        small = edit.compact(rank=max_rank)
        error = small.card["compacted"]["error"]
    rank = max_rank or small.rank
    tensors = {}
    for name, delta in small.deltas.items():
        left, right = _padded(delta, rank)
        tensors[f"{_PREFIX}{name}{_A}"], tensors[f"{_PREFIX}{name}{_B}"] = right, left
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS[lm.kind],
        "base_model_name_or_path": lm.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(small.deltas),
        "fan_in_fan_out": all(site.transposed for site in sites),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    with new_folder(folder, overwrite=overwrite) as new:
        write_tensors(new / "adapter_model.safetensors", tensors)
        write_json(new / "adapter_config.json", config)
        (new / "README.md").write_text(_card(edit, rank, error), encoding="utf-8")
    return Adapter(rank, error)


def _sites(lm: LM, deltas: Mapping[str, LowRank]) -> list[Site]:
    """The matrices of an edit; an adapter cannot mix the two ways of storing them."""
    known = {site.name: site for site in all_sites(lm.model)}
    if missing := [name for name in deltas if name not in known]:
        raise ModelError(f"{lm.name} has no matrix {missing[0]}; this edit belongs to another model.")
    sites = [known[name] for name in deltas]
    if len({site.transposed for site in sites}) > 1:
        raise ModelError("A PEFT adapter cannot hold Linear and Conv1D matrices at once.")
    return sites


def _padded(delta: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """The factors with zeros up to a rank."""
    more = rank - delta.rank
    left = torch.nn.functional.pad(delta.left, (0, more))
    return left, torch.nn.functional.pad(delta.right, (0, 0, 0, more))


def _card(edit: Edit, rank: int, error: float) -> str:
    cut = f"Cut to rank {rank}: relative error {error:.2e}." if error else f"Rank {rank}, nothing cut."
    return card_of(edit.origin, edit.card, library="peft", notes=[cut])


@torch.no_grad()
def prove(edit: Edit, lm: LM, folder: str | Path, prompts: Sequence[str] | None = None) -> float:
    """Load an exported adapter with PEFT and compare it with the edit itself.

    Args:
        edit: what was exported.
        lm: the model; it comes back as it was.
        folder: the adapter's.
        prompts: where to compare; by default the prompts of the edit.

    Returns:
        The largest difference of any logit of the answer's first token (of any class for a classifier).

    Raises:
        RequestError: PEFT is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RequestError("To prove an export PEFT is needed: pip install peft") from error
    asked = list(prompts or [request.prompt for request in edit.origin.requests])
    with edit.applied(lm):
        expected = lm.next_logits(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still asks transformers by an older name
        wrapped = PeftModel.from_pretrained(lm.model, str(folder)).eval()
    try:
        found = lm.next_logits(asked)  # PEFT puts its layers into the model itself
    finally:
        wrapped.unload()
        lm.model.requires_grad_(False)
    return float((found - expected).abs().max())


def from_peft(folder: str | Path, lm: LM) -> Edit:
    """Read a PEFT LoRA adapter as an edit.

    Args:
        folder: the adapter's.
        lm: the model that it is for.

    Raises:
        StorageError: a file is missing or damaged.
        RequestError: the adapter is not a plain LoRA of weight matrices.
        ModelError: the model has no such matrices.
    """
    where = Path(folder).expanduser()
    config = read_json(where / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise RequestError(
            f"{where} is not a LoRA adapter but {config.get('peft_type')!r}; only LoRA is an edit."
        )
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise RequestError(
                f"{where} uses {key}={config[key]!r}, which is more than low-rank changes of weights."
            )
    tensors = read_tensors(where / "adapter_model.safetensors")
    names = [key.removeprefix(_PREFIX).removesuffix(_A) for key in tensors if key.endswith(_A)]
    if len(names) * 2 != len(tensors):
        strange = next(key for key in tensors if not key.endswith((_A, _B)))
        raise RequestError(f"{where} holds {strange}, which is no factor of a weight matrix.")
    deltas = {}
    for name in names:
        right, left = tensors[f"{_PREFIX}{name}{_A}"], tensors[f"{_PREFIX}{name}{_B}"]
        deltas[name] = LowRank(left, right).scale(_scale(config, name, right.shape[0]))
    _sites(lm, deltas)
    origin = Origin(
        fingerprint=lm.fingerprint,
        model=lm.name,
        editor="lora-adapter",
        settings={"adapter": str(folder), "r": config.get("r"), "lora_alpha": config.get("lora_alpha")},
        requests=(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Edit(deltas, origin)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """``alpha / r`` of one matrix, or ``alpha / sqrt(r)``; patterns match the end of a module's name."""

    def of(pattern: Mapping[str, Any], default: Any) -> float:
        found = [value for key, value in (pattern or {}).items() if name == key or name.endswith(f".{key}")]
        return float(found[0] if found else default)

    alpha = of(config.get("alpha_pattern", {}), config.get("lora_alpha", 8))
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def to_merged(
    edit: Edit, lm: LM, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Merged:
    """Write a whole checkpoint with the edit merged into its weights, and the tokenizer beside it.

    Args:
        edit: the edit.
        lm: the model; its weights are changed while this runs and are restored bit for bit.
        folder: where the checkpoint shall be.
        dtype: of the checkpoint; by default the model's own.
        overwrite: replace what is there.

    Returns:
        What the merge lost in that dtype.

    Raises:
        MismatchError: the edit was made for another model.
        ModelError: a matrix is quantised.
        StorageError: the folder already holds something, or cannot be written.
    """
    edit.check(lm)
    with new_folder(folder, overwrite=overwrite) as new:
        if dtype is None or dtype == lm.model.dtype:
            merged = merge(lm.model, edit.deltas)
            try:
                lm.model.save_pretrained(new)
            finally:
                merged.restore()
        else:
            twin = copy.deepcopy(lm.model).to(dtype)
            merged = merge(twin, edit.deltas, keep=False)
            twin.save_pretrained(new)
        lm.tokenizer.save_pretrained(new)
        write_json(
            new / "emendo.json",
            {"version": __version__, "merge_loss": merged.loss, "fingerprint": edit.origin.fingerprint},
        )
    return merged
