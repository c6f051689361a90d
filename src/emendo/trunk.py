"""A model split at its first edited block.

Everything below that block is frozen and its output depends on the text alone, so it runs once per text
(:meth:`Trunk.run`) and every later pass starts from what it gave (:meth:`Trunk.logits`). No per-model code:
a forward pre-hook takes the hidden state and stops the pass; to resume, the blocks below are stand-ins that
hand their input on, and a pre-hook feeds the kept hidden state to the first edited block. The list keeps its
length, so layer indices, masks and rotary tables stay right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emendo.errors import ModelError
from emendo.sites import Site, find_stacks


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Pass(nn.Module):
    """Stands for a block below the trunk's top: hands its input on, answers for the block's attributes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not registered as a child: it must not show up as one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Trunk:
    """The frozen blocks of a one-stack model below the first edited site, and the way on from there.

    Args:
        model: the model; it is not changed.
        sites: what is edited; the trunk ends below the lowest of their blocks.

    Raises:
        ModelError: the sites stand in several stacks, or the model's outputs cannot be scored by token.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        names = {site.stack for site in sites}
        if len(names) != 1:
            raise ModelError(f"A trunk needs sites in exactly one stack of blocks, not in {sorted(names)}.")
        self.stack = names.pop()
        if len(find_stacks(model)) > 1:
            raise ModelError(
                f"{type(model).__name__} has several stacks of blocks; only decoder-only models are supported."
            )
        self.block = min(site.block for site in sites)
        self.model = model
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ModelError(
                f"{type(model).__name__} has no vocabulary projection, so the probability of a target text "
                "cannot be read from it. Load it as a causal language model."
            )
        self.head: nn.Module = head
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        inputs: dict[str, Any] = {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "use_cache": False,
        }
        if self._takes_positions and not bool(attention_mask[:, 0].all()):  # padded on the left
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs

    @torch.no_grad()
    def run(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The hidden state ``[batch, tokens, width]`` that enters the first edited block.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, 1 for text and 0 for padding.
        """

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Stop(args[0] if args else kwargs["hidden_states"])

        first = self.model.get_submodule(f"{self.stack}.{self.block}")
        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**self._inputs(input_ids, attention_mask))
        except _Stop as stopped:
            return stopped.hidden
        finally:
            handle.remove()
        raise ModelError(f"{type(self.model).__name__} never ran its block {self.stack}.{self.block}.")

    @contextmanager
    def _resuming(self, hidden: Tensor) -> Iterator[None]:
        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (hidden.to(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden.to(kwargs["hidden_states"])}

        blocks = self.model.get_submodule(self.stack)
        below = {str(i): blocks._modules[str(i)] for i in range(self.block)}
        handle = blocks._modules[str(self.block)].register_forward_pre_hook(feed, with_kwargs=True)  # type: ignore[union-attr]
        try:
            for key, block in below.items():
                blocks._modules[key] = _Pass(block)  # type: ignore[arg-type]
            yield
        finally:
            blocks._modules.update(below)
            handle.remove()

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """Logits at the asked positions only, resumed from the trunk's output.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``.
            positions: ``[n]``, indices into the flattened ``batch * tokens``.
            hidden: ``[batch, tokens, width]`` from :meth:`run`; None runs the whole model.

        Returns:
            ``[n, vocabulary]``; row ``i`` predicts the token after position ``i``.
        """

        def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            rows = args[0].flatten(0, 1).index_select(0, positions.to(args[0].device))
            return (rows.unsqueeze(0),)

        with ExitStack() as stack:
            stack.callback(self.head.register_forward_pre_hook(gather).remove)
            if hidden is not None:
                stack.enter_context(self._resuming(hidden))
            output = self.model(**self._inputs(input_ids, attention_mask))
        logits: Tensor = output.logits.squeeze(0)
        return logits
