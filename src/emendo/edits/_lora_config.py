"""The ``adapter_config.json`` of a PEFT LoRA adapter, read as PEFT reads it.

Each option of PEFT's ``LoraConfig`` is read here, has no influence on what a finished adapter computes, or must be off.
An option of a later version of PEFT must be off too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emendo._storage import read_json
from emendo.errors import RequestError, StorageError


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_patterns(value: Any, of: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(of(number) for number in value.values()))


READ: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "r": _is_count,
    "lora_alpha": _is_number,
    "use_rslora": lambda value: value is None or isinstance(value, bool),
    "rank_pattern": lambda value: _is_patterns(value, _is_count),
    "alpha_pattern": lambda value: _is_patterns(value, _is_number),
    "target_modules": lambda value: isinstance(value, str) or _is_texts(value),
    "exclude_modules": lambda value: value is None or isinstance(value, str) or _is_texts(value),
    "layers_to_transform": lambda value: (
        value is None
        or isinstance(value, int)
        or (isinstance(value, list) and all(isinstance(index, int) for index in value))
    ),
    "layers_pattern": lambda value: value is None or isinstance(value, str) or _is_texts(value),
    "modules_to_save": lambda value: value is None or _is_texts(value),
    "target_parameters": lambda value: value is None or _is_texts(value),
}
"""Options that are read, and the values they can have."""

IGNORED = frozenset(
    [
        *(
            "task_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        ),
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "runtime_config", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    ]
)
"""Options that matter in training or for merging, or beside another option that must be off."""

OFF: Mapping[str, tuple[Any, ...]] = {
    "init_lora_weights": (
        True,
        False,
        "gaussian",
        "eva",
        "orthogonal",
        "mica",
    ),  # others change the base weights
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "megatron_config": (),
    "trainable_token_indices": ([], {}),
    "velora_config": (),
    "alora_invocation_tokens": (),
    "monteclora_config": (),
    "layer_replication": ([],),
    "use_bdlora": (False,),
    "arrow_config": (),
    "kasa_config": (),
}
"""Options that would do more than add low-rank changes to the model's weights, and the values at which they do not."""

_UNKNOWN_OFF: tuple[Any, ...] = (False, [], {})


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of a LoRA adapter.

    Attributes:
        values: the content of ``adapter_config.json``.
    """

    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> LoraSettings:
        """Read ``adapter_config.json``.

        Raises:
            StorageError: it is missing or damaged.
            RequestError: the adapter is not a LoRA, or does more than add low-rank changes to weights.
        """
        path = folder / "adapter_config.json"
        values = read_json(path)
        if not isinstance(values, dict):
            raise StorageError(f"{path} is damaged: it holds no object.")
        if values.get("peft_type") != "LORA":
            raise RequestError(
                f"{folder} is not a LoRA adapter but {values.get('peft_type')!r}; only LoRA can be imported."
            )
        values = {"r": 8, "lora_alpha": 8, **values}
        if values.get("target_parameters") and values.get("target_modules") is None:
            values["target_modules"] = []
        for name, value in values.items():
            if name in READ and not READ[name](value):
                raise StorageError(f"{path} is damaged: {name}={value!r}.")
            off = OFF.get(name, _UNKNOWN_OFF)
            if name not in READ and name not in IGNORED and value is not None and not _is_one_of(value, off):
                raise RequestError(
                    f"{folder} uses {name}={value!r}, which does more than add low-rank changes to weights, or is "
                    "unknown to this version of emendo. Merge the adapter with PEFT, and use the merged model."
                )
        if "target_modules" not in values:
            raise StorageError(f"{path} is damaged: it names no target_modules.")
        settings = cls(values)
        try:
            settings.scale("a.0.b"), settings.targets("a.0.b", nn.Module())
        except re.error as error:
            raise StorageError(
                f"{path} is damaged: {error.pattern!r} is not a regular expression."
            ) from error
        return settings

    def rank(self, name: str) -> int:
        """The rank at a module."""
        found: int = _of_pattern(self.values.get("rank_pattern"), name, self.values["r"])
        return found

    def scale(self, name: str) -> float:
        """The factor of ``lora_B @ lora_A`` at a module: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``."""
        alpha = float(_of_pattern(self.values.get("alpha_pattern"), name, self.values["lora_alpha"]))
        rank = self.rank(name)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def targets(self, name: str, model: nn.Module) -> bool:
        """Whether PEFT loads the adapter's factors for a module."""
        excluded, kept = self.values.get("exclude_modules"), self.values.get("modules_to_save")
        if excluded and _names(excluded, name):
            return False
        if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in kept or ()):
            return False
        modules = self.values["target_modules"]
        if modules == "all-linear":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            return head is None or model.get_submodule(name) is not head
        if not _names(modules, name):
            return False
        return isinstance(modules, str) or name in modules or self._transforms(name)

    @property
    def parameters(self) -> list[str]:
        """The parameters that are changed as a whole, by their names or the ends of their names."""
        return list(self.values.get("target_parameters") or ())

    def _transforms(self, name: str) -> bool:
        """Whether a module is in one of ``layers_to_transform``."""
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            before = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            if match := re.match(rf"{before}{pattern}\.(?P<idx>\d+)\.", name):
                return int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)
        return False


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a JSON value is among some; unlike ``in``, 0 is not False."""
    return any(value == other and type(value) is type(other) for other in allowed)


def _names(modules: str | list[str], name: str) -> bool:
    """Whether a regular expression, or a list of names or their ends, matches a module's name."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
