"""Attention of half-precision models in float32 where it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cases import build_model, random_texts
from emendo.models._forward import wide_attention
from emendo.models.sites import find_sites
from emendo.models.text import collate
from emendo.models.trunk import Trunk


class Watch(TorchFunctionMode):
    """Notes the dtype that each attention is computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def parts(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 5, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_float32_attention_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = parts(dtype)
    mask = torch.randn(5, 5).to(dtype)
    with Watch() as watch, wide_attention(nn.Linear(2, 2, dtype=dtype)):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert (q @ k.mT).dtype == dtype, "nothing else is changed"
    assert watch.seen == [torch.float32]
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask.float()).to(dtype)
    assert found.equal(expected)
    ones = torch.ones_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), ones),
        torch.autograd.grad(expected, (q, k, v), ones),
        strict=True,
    ):
        assert one.equal(other)


def test_a_mask_of_booleans_stays_one() -> None:
    q, k, v = parts(torch.bfloat16)
    mask = torch.ones(5, 5).tril().bool()
    with wide_attention(nn.Linear(2, 2, dtype=torch.bfloat16)):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_does_nothing_in_full_precision_or_without_a_gradient(dtype: torch.dtype) -> None:
    assert isinstance(wide_attention(nn.Linear(2, 2, dtype=dtype)), nullcontext)
    with torch.no_grad():
        assert isinstance(wide_attention(nn.Linear(2, 2, dtype=torch.bfloat16)), nullcontext)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_trunk_is_resumed_with_it(kind: str) -> None:
    """The gradient is as near the exact one as the format allows; passes without one are the model's own."""
    model, exact = (build_model(kind, dtype) for dtype in (torch.bfloat16, torch.float64))
    exact.load_state_dict(model.state_dict())
    batch, gradients = collate(random_texts(kind, 9, 12, 7)), []
    for one, dtype in ((model, torch.float32), (exact, torch.float64)):
        trunk = Trunk(one, find_sites(one, last=2))
        with Watch() as watch:
            hidden = trunk.run(batch).requires_grad_()
            assert set(watch.seen) <= {next(one.parameters()).dtype}
            watch.seen.clear()
            trunk.logits(batch, hidden, trunk.packing(batch)).float().log_softmax(-1)[:, 0].sum().backward()
        assert watch.seen
        assert set(watch.seen) == {dtype}
        assert hidden.grad is not None
        gradients.append(hidden.grad.double())
    near = torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    assert near > 0.99
