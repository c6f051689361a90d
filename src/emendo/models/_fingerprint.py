"""A name for everything that decides a model's answers, so that an edit is only applied to the model it was made for.

A fingerprint has up to four parts of hex digits, ``SAMPLE-WEIGHTS-CONFIG-TOKENIZER``:

- ``SAMPLE``: names, shapes and 1,024 evenly spaced values of every parameter. Files from before the other parts existed
  carry this part alone, so it is also how they are recognised.
- ``WEIGHTS``: every value of every parameter.
- ``CONFIG``: the config's fields that differ from their defaults, without those that do not affect the output.
- ``TOKENIZER``: vocabulary, merges, special tokens, chat template, and the tokens of a fixed text.

Values are rounded to bfloat16 first, so a model keeps its fingerprint when it is cast between float32 and bfloat16. A
float16 copy has another one, because rounding twice differs from rounding once: train and edit in the same format.
Hooks do not change a fingerprint; merging an edit into the weights does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from emendo._storage import digest, new_file, read_json, write_json
from emendo.errors import StorageError
from emendo.models.offloading import named_weights

_SAMPLE = 1024  # values of each parameter
_CHUNK = 2**22  # values hashed at once
_CHUNKS = 32  # in memory at one time, if the weights are offloaded
_WORTH_CACHING = 2**26  # bytes of weights; smaller models are hashed faster than a file is written

_COSMETIC = {
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a config that do not affect the model's outputs; nor do those that begin with "_"."""

_PROBE = (
    "The 3 quick brown foxes aren't at 12,345.67 km/h — they said: \"Don't\" (v2.0)!\n\n\tdef f(x_1): return {x: 'é'}  "
    "  # Größe naïve e\u0301tude 北京市は東京 ภาษาไทย हिन्दी العربية עברית 한국어 Київ Ελλάδα 👩‍👩‍👧 ﬁ Ａ\u00a0\u200b."
)
"""A text whose tokens depend on a tokenizer's normalisation and splitting rules, in many scripts."""


@dataclass(frozen=True)
class ModelFiles:
    """The files that a model and its tokenizer were read from, so that what takes long to hash can be cached.

    Attributes:
        key: digest of their paths, sizes and times, and of the number format of the weights.
        versions: the version counters of the parameters just after loading; a change in place raises one.
        folder: where hashes are cached.
        source: the folder of the files.
    """

    key: str
    versions: tuple[int, ...]
    folder: Path
    source: Path

    @classmethod
    def of(cls, source: Path, files: Iterable[Path], model: nn.Module, folder: Path) -> Self:
        """The files of a model that was just loaded from them."""
        stats = [
            (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)
        ]
        return cls(digest([stats, str(next(model.parameters()).dtype)]), _versions(model), folder, source)


def fingerprint(model: nn.Module, tokenizer: Any = None, files: ModelFiles | None = None) -> str:
    """The fingerprint of a model, with its tokenizer if one is given.

    Args:
        model: the model.
        tokenizer: its tokenizer; without one, the last part is missing.
        files: the files that both were read from. The hashes of all weights and of the whole vocabulary are then
            cached, and used as long as ``SAMPLE``, the version counters, the special tokens, the template and the
            tokens of the fixed text are the same.
    """
    sample = _sample(model)
    rules = None if tokenizer is None else digest(_rules(tokenizer))
    weights, vocabulary = _cached([sample, rules], model, tokenizer, files)
    parts = [sample, weights]
    if (config := getattr(model, "config", None)) is not None:
        parts.append(digest(_settings(config.to_diff_dict()))[:8])
        if tokenizer is not None:
            parts.append(digest([rules, vocabulary])[:8])
    return "-".join(parts)


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, as far as both tell."""
    return all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def difference(one: str, other: str) -> str:
    """The difference between two fingerprints, in words."""
    names = ("The weights differ", "The weights differ", "The config differs", "The tokenizer differs")
    parts = zip(names, one.split("-"), other.split("-"), strict=False)
    return next((words for words, a, b in parts if a != b), "Nothing differs")


@torch.no_grad()
def _sample(model: nn.Module) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in named_weights(model):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        found.update(_bytes(flat[:: max(1, len(flat) // _SAMPLE)]))
    return found.hexdigest()


def _bytes(values: Tensor) -> bytes:
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return values.cpu().contiguous().numpy().tobytes()


def _cached(
    sketch: list[str | None], model: nn.Module, tokenizer: Any, files: ModelFiles | None
) -> tuple[str, str]:
    """The hashes of all weights and of the vocabulary, from the cache where ``sketch`` says that they still hold."""

    def computed() -> tuple[str, str]:
        return _weights(model), "" if tokenizer is None else _vocabulary(tokenizer)

    if files is None or files.versions != _versions(model):
        return computed()
    file = files.folder / f"{files.key}.json"
    with suppress(StorageError):  # no entry, or a damaged one
        known = read_json(file)
        if isinstance(known, dict) and known.get("sketch") == sketch:
            return str(known["weights"]), str(known["vocabulary"])
    weights, vocabulary = computed()
    if sum(p.numel() * p.element_size() for p in model.parameters()) >= _WORTH_CACHING:
        with (
            suppress(StorageError),
            new_file(file) as temporary,
        ):  # a cache that cannot be written is no error
            write_json(temporary, {"sketch": sketch, "weights": weights, "vocabulary": vocabulary})
    return weights, vocabulary


def _versions(model: nn.Module) -> tuple[int, ...]:
    return tuple(0 if p.is_meta or p.is_inference() else p._version for p in model.parameters())


@torch.no_grad()
def _weights(model: nn.Module) -> str:
    """Hash every value, on all cores: hashing releases Python's lock."""
    chunks = (
        chunk for _, tensor in named_weights(model) for chunk in tensor.detach().reshape(-1).split(_CHUNK)
    )
    digests: list[bytes] = []
    with ThreadPoolExecutor() as pool:
        while some := list(islice(chunks, _CHUNKS)):
            digests += pool.map(lambda chunk: hashlib.blake2b(_bytes(chunk), digest_size=16).digest(), some)
    return hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest()


def _settings(value: Any) -> Any:
    """A config as JSON values, without its cosmetic fields at any depth."""
    if isinstance(value, dict):
        kept = {str(key): _settings(item) for key, item in value.items() if key not in _COSMETIC}
        return {key: item for key, item in kept.items() if item is not None and not key.startswith("_")}
    if isinstance(value, list | tuple):
        return [_settings(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _rules(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's behaviour, apart from its whole vocabulary."""
    special = tokenizer.special_tokens_map.items()
    return {
        "special": {name: str(token) for name, token in special if name != "pad_token"},
        "template": tokenizer.chat_template,
        "probe": tokenizer(_PROBE)["input_ids"],
    }


def _vocabulary(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    return digest([tokenizer.get_vocab(), merges])
