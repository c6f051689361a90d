"""Running a model of any kind on a batch of texts: its inputs, and the logits at the label positions.

On a processor, the differentiated passes of a half-precision model compute attention in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from emendo.errors import ModelError
from emendo.models.sites import input_device, kind_of
from emendo.models.text import TokenBatch


def model_inputs(model: nn.Module, batch: TokenBatch, *, positions: bool = False) -> dict[str, Any]:
    """The keyword arguments of a model's ``forward`` for a batch of texts.

    A decoder needs no attention mask for texts padded on the right, because no token attends to later ones. Without a
    mask, attention builds no mask matrix.

    Args:
        model: a model of any kind.
        batch: the texts.
        positions: pass ``position_ids`` where the batch is padded on the left.
    """
    device = input_device(model)
    pad = getattr(model.config, "pad_token_id", None) or 0

    def tokens(ids: Tensor, mask: Tensor) -> Tensor:  # some models find the text's end by the padding id
        return ids.masked_fill(mask == 0, pad).to(device)

    kind = kind_of(model)
    ids, mask = tokens(batch.input_ids, batch.attention_mask), batch.attention_mask.to(device)
    if kind == "classifier":
        cache = "use_cache" in inspect.signature(model.forward).parameters
        return {"input_ids": ids, "attention_mask": mask, **({"use_cache": False} if cache else {})}
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


@contextmanager
def contiguous_projection(model: nn.Module) -> Iterator[None]:
    """Make the rows that the vocabulary projection reads contiguous.

    ``generate`` projects the last token of each prompt, a strided view of the hidden states. On a processor that takes
    the product 10 times as long in float32, and several hundred times in bfloat16.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def label_logits(
    model: nn.Module, inputs: dict[str, Any], positions: Tensor, extra: Tensor | None = None
) -> Tensor:
    """Run a model and return the logits at some positions of the flattened batch.

    The vocabulary projection computes these positions only. A classifier has one row of logits for each text; a single
    logit z becomes (0, z), so that the second class has the probability sigmoid(z).

    Args:
        model: a model of any kind.
        inputs: keyword arguments of its ``forward``.
        positions: ``[n]`` the positions at which labels are predicted.
        extra: ``[m, width]`` further inputs of the vocabulary projection; for a classifier, further logits.

    Returns:
        Logits ``[n + m, vocabulary]``.

    Raises:
        ModelError: the model predicts several tokens at each position.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        scores: Tensor = model(**inputs).logits
        if scores.shape[-1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], -1)
        owners = (positions // inputs["input_ids"].shape[1]).to(scores.device)
        return _append(scores.index_select(0, owners), extra)

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if args[0].dim() != 3:
            raise ModelError(
                f"{type(model).__name__} predicts from hidden states {tuple(args[0].shape)} instead of [texts, tokens, "
                "width], so it cannot be edited."
            )
        rows = args[0].flatten(0, 1).index_select(0, positions.to(args[0].device))
        return (_append(rows, extra).unsqueeze(0),)

    with head.register_forward_pre_hook(gather):
        logits: Tensor = model(**inputs).logits.squeeze(0)
    return logits


def _append(rows: Tensor, extra: Tensor | None) -> Tensor:
    return rows if extra is None else torch.cat([rows, extra.to(rows)])


def wide_attention(model: nn.Module) -> AbstractContextManager[object]:
    """Compute attention in float32 in the differentiated passes of a half-precision model on a processor.

    The backward pass of torch's fused kernel multiplies the few rows of each head and text in half precision. For short
    texts that takes ten times as long as float32, conversions included, and is less exact. Elsewhere the context has no
    effect.
    """
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
