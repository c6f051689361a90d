"""Keys and values of a decoder's batch: rows join, leave, and lose padding that none of them needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def new_cache(model: nn.Module) -> Any:
    """An empty cache of the kind that the model's blocks need."""
    return DynamicCache(config=model.config)


def can_grow(cache: Any) -> bool:
    """Whether rows can join: every block keeps all keys and values, in the order of the tokens.

    Sliding windows and the states of recurrent blocks cannot be padded to another length.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def concatenated(cache: Any, more: Any) -> Any:
    """The rows of two caches as one, the shorter one padded on the left."""
    for layer, other in zip(cache.layers, more.layers, strict=True):
        length = max(layer.keys.shape[-2], other.keys.shape[-2])
        layer.keys = torch.cat([_padded(layer.keys, length), _padded(other.keys, length)])
        layer.values = torch.cat([_padded(layer.values, length), _padded(other.values, length)])
    return cache


def selected(cache: Any, rows: Tensor, start: int) -> Any:
    """Some rows of a cache, without the first ``start`` tokens, which is possible if it :func:`can_grow`."""
    cache.batch_select_indices(rows)
    if start:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]
    return cache


def _padded(states: Tensor, length: int) -> Tensor:
    return pad(states, (0, 0, length - states.shape[-2], 0))
