"""Norms of weights however they are stored, merging changes into weights, and undoing it exactly."""

from __future__ import annotations

import pytest
import torch

from cases import build_model, unchanged
from emendo.edits import Edit, Origin, merge, weight_norm
from emendo.errors import ModelError, RequestError
from emendo.low_rank import LowRank
from emendo.models._fingerprint import fingerprint
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


class Packed(torch.nn.Module):
    """A linear layer as libraries of quantised ones make them: packed bytes, a scale for each row, a bias."""

    def __init__(self, weight: torch.Tensor, bits: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        high = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(1, keepdim=True) / high
        whole = (weight / scale).round().to(torch.int8)
        if bits == 4:
            whole = (whole[:, ::2] & 15) | (whole[:, 1::2] << 4)
        self.register_buffer("weight", whole)
        self.register_buffer("scale", scale)
        self.bits, self.bias = bits, bias

    def dense(self) -> torch.Tensor:
        whole = self.weight
        if self.bits == 4:
            low, high = (whole << 4) >> 4, whole >> 4
            whole = torch.stack([low, high], -1).flatten(1)
        return whole.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dense(), self.bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_the_norm_of_a_packed_weight_is_that_of_its_matrix(bits: int, bias: bool) -> None:
    weight = torch.randn(24, 1500)
    packed = Packed(weight, bits, torch.randn(24) if bias else None)
    found = weight_norm(packed, (1500, 24))
    assert found == pytest.approx(float(packed.dense().double().norm()), rel=1e-5)
    assert found == pytest.approx(float(weight.norm()), rel=0.03 if bits == 4 else 1e-3)
    packed.register_forward_hook(lambda module, args, out: out * 0)  # as an attached edit changes the output
    assert weight_norm(packed, (1500, 24)) == found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_relative_norms_of_a_packed_model_are_those_of_the_plain_one(kind: str) -> None:
    model = build_model(kind)
    found = changes(model, 1e-2)
    edit = Edit(found, Origin(fingerprint(model), "m", "e", {}, (), "2026-01-01"))
    assert edit.relative_norms(model) == pytest.approx(dict.fromkeys(found, 1e-2), rel=1e-5)
    for site in find_sites(model):
        parent = model.get_submodule(site.name.rpartition(".")[0])
        setattr(parent, site.name.rpartition(".")[2], Packed(site.weight(model).data, 8, None))
    assert edit.relative_norms(model) == pytest.approx(dict.fromkeys(found, 1e-2), rel=1e-2)


def test_a_matrix_of_zeros_has_no_relative_norm() -> None:
    model = build_model("llama")
    found = changes(model, 1e-2)
    edit = Edit(found, Origin("f", "m", "e", {}, (), "2026-01-01"))
    site = find_sites(model)[0]
    site.weight(model).zero_()
    assert edit.relative_norms(model)[site.name] == float("inf")
    assert edit.scale(0.0).relative_norms(model)[site.name] == 0.0
