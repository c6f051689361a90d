"""Merging changes into weights: what it loses in each dtype, and the exact way back."""

from __future__ import annotations

import pytest
import torch

from cases import build_model, unchanged
from emendo.edits.merging import merge
from emendo.errors import ModelError, RequestError
from emendo.low_rank import LowRank
from emendo.models.sites import find_sites


def changes(model: torch.nn.Module, size: float) -> dict[str, LowRank]:
    """A random change of rank 3 for each MLP matrix, of ``||dW|| = size * ||W||``."""
    torch.manual_seed(1)
    found = {}
    for site in find_sites(model):
        delta = LowRank(torch.randn(site.d_out, 3), torch.randn(3, site.d_in))
        found[site.name] = delta.scale(size * float(site.weight(model).float().norm() / delta.norm()))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merge_is_the_rounded_sum_and_restores_bit_for_bit(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build_model(kind, dtype)
        deltas, before = changes(model, 1e-2), {s.name: s.weight(model).clone() for s in find_sites(model)}
        with unchanged(model):
            merged = merge(model, deltas)
            for site in find_sites(model):
                change = deltas[site.name].to(torch.float64).dense()
                expected = (before[site.name].double() + change).to(dtype)
                torch.testing.assert_close(site.weight(model), expected, rtol=0, atol=0)
                lost = (site.weight(model).double() - before[site.name].double() - change).norm()
                assert merged.losses[site.name] == pytest.approx(float(lost / change.norm()), rel=1e-6)
            merged.restore()


def test_the_coarser_the_dtype_and_the_smaller_the_change_the_more_is_lost() -> None:
    loss = {
        (dtype, size): merge(build_model("llama", dtype), changes(build_model("llama"), size)).loss
        for dtype in (torch.float32, torch.bfloat16)
        for size in (1e-2, 1e-3)
    }
    assert loss[torch.float32, 1e-3] < 1e-3
    assert 0.01 < loss[torch.bfloat16, 1e-2] < 0.2 < loss[torch.bfloat16, 1e-3] < 1
    assert loss[torch.bfloat16, 1e-3] > 3 * loss[torch.bfloat16, 1e-2]


def test_what_was_not_kept_cannot_be_restored() -> None:
    model = build_model("llama")
    with pytest.raises(RequestError, match="keep=False"):
        merge(model, changes(model, 1e-2), keep=False).restore()


def test_a_quantised_or_missing_matrix_is_refused_before_anything_changes() -> None:
    model = build_model("llama")
    deltas = changes(model, 1e-2)
    last = find_sites(model)[-1]
    whole = last.module(model).weight
    try:
        last.module(model).weight = torch.nn.Parameter(whole.detach().to(torch.int8), requires_grad=False)
        with unchanged(model), pytest.raises(ModelError, match="quantised"):
            merge(model, deltas)
    finally:
        last.module(model).weight = whole
    with unchanged(model), pytest.raises(ModelError, match="no matrix elsewhere"):
        merge(model, {**deltas, "elsewhere": deltas[last.name]})
