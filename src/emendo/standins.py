"""Passes through a part of a model: ended before a module, or with stand-ins for blocks that need not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from emendo.errors import ModelError


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    def __init__(self, value: Any) -> None:
        self.value = value


def given(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What a module is given in a pass, which ends there."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    with module.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            run()
        except _Stop as stopped:
            return stopped.value  # type: ignore[no-any-return]
    raise ModelError(f"The model never ran its {type(module).__name__}.")


def values(module: nn.Module, run: Callable[[], object]) -> int:
    """How many values a module gives in a tuple, 0 for one that is in none, in a pass which ends there."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Stop(len(output) if isinstance(output, tuple) else 0)

    with module.register_forward_hook(stop):
        try:
            run()
        except _Stop as stopped:
            return stopped.value  # type: ignore[no-any-return]
    raise ModelError(f"The model never ran its {type(module).__name__}.")


class Pass(nn.Module):
    """Stands for a block below the trunk's top: hands its input on, answers for the block's attributes.

    Args:
        block: what it stands for.
        values: how many values that gives in a tuple, the hidden state first; 0 where it gives that alone.
    """

    def __init__(self, block: nn.Module, values: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not registered as a child: it must not show up as one
        object.__setattr__(self, "values", values)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What came in, in the form that the block gives."""
        return (hidden_states, *(None,) * (self.values - 1)) if self.values else hidden_states


@contextmanager
def lent_bias(owner: nn.Module, borrower: nn.Module) -> Iterator[None]:
    """T5's first block owns the table of relative positions; lend it to the block from which a pass resumes."""
    source, target = _bias_table(owner), _bias_table(borrower)
    if source is None or target is None or target.has_relative_attention_bias:
        yield
        return
    target.relative_attention_bias = source.relative_attention_bias
    target.has_relative_attention_bias = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del target.relative_attention_bias
        target.has_relative_attention_bias = False  # type: ignore[assignment]


def _bias_table(block: nn.Module) -> nn.Module | None:
    """The self-attention of a block of T5's kind, whose blocks hand a relative position bias on to each other."""
    return next((m for m in block.modules() if hasattr(m, "has_relative_attention_bias")), None)
