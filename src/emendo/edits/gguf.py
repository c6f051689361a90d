"""Edits as GGUF LoRA adapters, as llama.cpp reads them.

llama.cpp adds ``alpha / rank * lora_b lora_a`` to a matrix of the same name. Its Llama models store the rows of the
query and key projections in another order, by which rotary positions act on neighbouring pairs of numbers; the rows of
``lora_b`` follow them. All matrices are padded to one rank, and ``alpha`` is that rank.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emendo._outputs import GGUF, claim
from emendo._storage import new_file
from emendo._version import __version__
from emendo.edits._weights import Merged
from emendo.edits.edit import Edit
from emendo.edits.merged import to_merged
from emendo.edits.peft import Adapter, limited
from emendo.errors import ModelError, RequestError
from emendo.models.lm import LM

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
}
"""``model_type`` of a config -> the architecture that llama.cpp's converter makes of it."""
_CONVERTER = "convert_hf_to_gguf.py"


def to_gguf(edit: Edit, lm: LM, file: str | Path, *, max_rank: int | None = None) -> Adapter:
    """Write an edit as a GGUF LoRA adapter in fp32.

    Args:
        edit: the edit.
        lm: the model of the edit.
        file: the adapter's file; an older adapter of emendo is replaced.
        max_rank: compact every matrix to at most this rank, and pad to exactly it.

    Raises:
        MismatchError: the edit belongs to another model.
        RequestError: ``max_rank`` is not positive, or the edit holds NaN or infinite numbers.
        ModelError: the architecture is not among those whose names and orders are known, or a matrix has no name in
            llama.cpp, such as an output matrix that is the embedding.
        StorageError: the file is something else, or cannot be written.
    """
    small, adapter = limited(edit, lm, max_rank)
    tensors = _tensors(small, lm, adapter.rank)
    claim(file, GGUF)
    with new_file(file) as new:
        writer = _writer(new, _ARCHITECTURES[lm.model.config.model_type])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.rank))
        writer.add_string("emendo.version", __version__)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return adapter


def _writer(file: Path, architecture: str) -> GGUFWriter:
    from gguf import GGUFWriter

    return GGUFWriter(file, architecture)


def _tensors(edit: Edit, lm: LM, rank: int) -> dict[str, Tensor]:
    """The factors of every matrix by their names in llama.cpp."""
    config = lm.model.config
    names = _names(lm)
    tied = getattr(config, "tie_word_embeddings", False)
    found = {}
    for site, delta in edit.deltas.items():
        name = names.get_name(site)
        if name is None or (name == "output" and tied):
            raise ModelError(
                f"llama.cpp has no matrix of its own for {site}, so this edit cannot be a GGUF adapter. A checkpoint "
                "with the edit merged in can be converted: emendo export --to merged-gguf."
            )
        left = delta.left
        if _ARCHITECTURES[config.model_type] == "llama":
            if site.endswith(".q_proj"):
                left = _interleaved(left, config.num_attention_heads)
            elif site.endswith(".k_proj"):
                left = _interleaved(left, config.num_key_value_heads)
        more = rank - delta.rank
        found[f"{name}.weight.lora_a"] = nn.functional.pad(delta.right, (0, 0, 0, more))
        found[f"{name}.weight.lora_b"] = nn.functional.pad(left, (0, more))
    return found


def _names(lm: LM) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = getattr(lm.model.config, "model_type", "")
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"GGUF adapters are made for {', '.join(_ARCHITECTURES)}, not for a model of type {kind!r}. llama.cpp's "
            "convert_lora_to_gguf.py reads the PEFT adapter: emendo export --to peft."
        )
    architecture = {name: number for number, name in MODEL_ARCH_NAMES.items()}[_ARCHITECTURES[kind]]
    return get_tensor_name_map(architecture, lm.model.config.num_hidden_layers)


def _interleaved(left: Tensor, heads: int) -> Tensor:
    """Rows ``[d_out, rank]`` in llama.cpp's order: the two halves of each head's rows alternate."""
    halves: Tensor = left.unflatten(0, (heads, 2, len(left) // heads // 2))
    return halves.transpose(1, 2).reshape(left.shape)


def to_merged_gguf(edit: Edit, lm: LM, file: str | Path, *, dtype: torch.dtype | None = None) -> Merged:
    """Write a whole model with the edit merged in as GGUF, by llama.cpp's converter.

    The converter is the script ``convert_hf_to_gguf.py`` on the ``PATH``. It runs in this Python, and needs the
    packages that llama.cpp lists for it.

    Args:
        edit: the edit.
        lm: the model.
        file: the model's file.
        dtype: of the checkpoint that is converted; by default that of the model.

    Returns:
        The rounding error of the merge in that dtype.

    Raises:
        RequestError: the converter is not there.
        ModelError: the converter fails.
        StorageError: the file exists or cannot be written.
    """
    converter = shutil.which(_CONVERTER)
    if converter is None:
        raise RequestError(
            f"A merged GGUF is made by llama.cpp's {_CONVERTER}, which is not on the PATH. Put the folder of a copy of "
            "llama.cpp on it, or export an adapter: emendo export --to gguf."
        )
    claim(file, GGUF)
    with tempfile.TemporaryDirectory(prefix="emendo-") as work, new_file(file) as new:
        merged = to_merged(edit, lm, Path(work) / "checkpoint", dtype=dtype)
        command = [sys.executable, converter, str(Path(work) / "checkpoint"), "--outfile", str(new)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not new.exists():
            lines = done.stderr.strip().splitlines() or ["it wrote no file"]
            raise ModelError(f"{converter} failed: {lines[-1]}")
    return merged
