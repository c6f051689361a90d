"""A batch of texts as a model takes it, and the logits at its label positions, for a model of any kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from emendo.models.sites import kind_of
from emendo.models.text import TokenBatch


def model_inputs(model: nn.Module, batch: TokenBatch, *, positions: bool = False) -> dict[str, Any]:
    """What a model's ``forward`` takes for a batch of texts.

    A decoder needs no mask of texts that are padded on the right: no token reads what comes after it. Without one, the
    attention makes no table of who reads whom.

    Args:
        model: a model of any kind.
        batch: the texts.
        positions: give ``position_ids`` where the batch is padded on the left.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    pad = getattr(model.config, "pad_token_id", None) or 0

    def tokens(
        ids: Tensor, mask: Tensor
    ) -> Tensor:  # some models read off the padding's id where the text ends
        return ids.masked_fill(mask == 0, pad).to(device)

    kind = kind_of(model)
    ids, mask = tokens(batch.input_ids, batch.attention_mask), batch.attention_mask.to(device)
    if kind == "classifier":
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "seq2seq":
        assert batch.source_ids is not None and batch.source_mask is not None
        source = {
            "input_ids": tokens(batch.source_ids, batch.source_mask),
            "attention_mask": batch.source_mask.to(device),
        }
        return {**source, "decoder_input_ids": ids, "decoder_attention_mask": mask, "use_cache": False}
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if not bool(batch.attention_mask[:, 0].all()):  # padded on the left
        inputs["attention_mask"] = mask
        if positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def label_logits(
    model: nn.Module, inputs: dict[str, Any], positions: Tensor, beside: Tensor | None = None
) -> Tensor:
    """Run a model and keep the logits ``[n, vocabulary]`` at ``positions [n]`` of the flattened batch.

    The vocabulary projection sees those positions only. A classifier gives one row of logits for each text; one with a
    single logit z gives (0, z), so that the second class has the probability sigmoid(z).

    Args:
        model: a model of any kind.
        inputs: of its forward.
        positions: where the labels are predicted.
        beside: ``[m, width]`` that the vocabulary projection sees after the others, for ``m`` more rows of logits; a
            classifier's logits themselves.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        scores: Tensor = model(**inputs).logits
        if scores.shape[-1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], -1)
        owners = (positions // inputs["input_ids"].shape[1]).to(scores.device)
        return _with(scores.index_select(0, owners), beside)

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows = args[0].flatten(0, 1).index_select(0, positions.to(args[0].device))
        return (_with(rows, beside).unsqueeze(0),)

    with head.register_forward_pre_hook(gather):
        logits: Tensor = model(**inputs).logits.squeeze(0)
    return logits


def _with(rows: Tensor, beside: Tensor | None) -> Tensor:
    return rows if beside is None else torch.cat([rows, beside.to(rows)])


# --------------------
# Attention in float32 in the passes of a half-precision model that are differentiated on a processor.
#
# Going back, torch's fused kernel multiplies the few rows of each head and text in half precision. For short texts that
# takes ten times as long as doing it in float32, conversions included, and it is less exact.


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
