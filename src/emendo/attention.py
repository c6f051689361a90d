"""Attention in float32 in the passes of a half-precision model that are differentiated on a processor.

Going back, torch's fused kernel multiplies the few rows of each head and text in half precision. For short texts that
takes ten times as long as doing it in float32, conversions included, and it is less exact.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def wide_attention(model: nn.Module) -> AbstractContextManager[object]:
    """A context for the passes of ``model``; it does nothing where nothing would be gained."""
    weight = next(model.parameters())
    half = weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu"
    return _Wide() if half and torch.is_grad_enabled() else nullcontext()


class _Wide(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query: Tensor = args[0] if args else kwargs["query"]
        found: Tensor = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return found.to(query.dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
