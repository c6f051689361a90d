"""Training of editors; importing the settings alone does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emendo.train.config import TrainConfig

if TYPE_CHECKING:
    from emendo.train.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("emendo.train.loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
