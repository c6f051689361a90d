"""Captured factors against dense autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import ARCHITECTURES, VOCABULARY, build_model, plain_logits, random_texts, unchanged
from emendo.errors import ModelError
from emendo.models.capture import Factors, all_finite, capture, move
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_nll
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text, TokenBatch, collate
from emendo.models.trunk import Trunk

KINDS = list(ARCHITECTURES)
SAMPLE = ["llama", "gpt2", "t5-gated", "bart", "bert"]


def three_texts(side: Any = "right") -> TokenBatch:
    lengths = ((11, 7), (5, 4), (8, 3))  # tokens, and where the answer begins
    return collate(
        [Text(tuple(torch.randint(2, VOCABULARY, (n,)).tolist()), s) for n, s in lengths], side=side
    )


def nll(model: Any, batch: TokenBatch) -> Tensor:
    """Each example's loss, from the whole logits of a plain pass."""
    return per_example(token_nll(plain_logits(model, batch), batch.labels), batch.owner, len(batch))


def dense_gradients(model: Any, sites: tuple[Site, ...], loss: Callable[[Any], Tensor]) -> list[Tensor]:
    """The reference: plain autograd with respect to the weights, each as `[d_out, d_in]`."""
    twin = copy.deepcopy(model)
    weights = [site.module(twin).weight.requires_grad_() for site in sites]
    gradients = torch.autograd.grad(loss(twin), weights)
    return [g.T if site.transposed else g for site, g in zip(sites, gradients, strict=True)]


def rebuilt(factors: Factors, example: int | None = None) -> Tensor:
    """``sum_i delta_i u_i^T``, over all rows or over one example's."""
    rows = slice(None) if example is None else factors.owner == example
    return factors.delta[rows].T @ factors.u[rows]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_rebuild_the_dense_gradient_of_every_site(kind: str) -> None:
    model = build_model(kind, torch.float64)
    sites, batch = find_sites(model, "all"), collate(random_texts(kind, 11, 5, 8))
    with unchanged(model):
        losses, factors = capture(model, sites, lambda: nll(model, batch))
    close(losses, nll(model, batch))
    assert not any(tensor.requires_grad for f in factors.values() for tensor in (losses, f.u, f.delta))
    for site, expected in zip(
        sites, dense_gradients(model, sites, lambda m: nll(m, batch).sum()), strict=True
    ):
        assert factors[site.name].u.dtype == torch.float64
        assert expected.norm() > 1e-3
        close(rebuilt(factors[site.name]), expected)
    for example in range(3):
        single = dense_gradients(model, sites, lambda m, i=example: nll(m, batch)[i])
        for site, expected in zip(sites, single, strict=True):
            close(rebuilt(factors[site.name], example), expected)


@pytest.mark.parametrize(
    ("kind", "which"), [(kind, "all") for kind in SAMPLE] + [("t5", "*decoder*"), ("bart", "*decoder*")]
)
def test_factors_of_a_resumed_pass_rebuild_the_dense_gradient(kind: str, which: str) -> None:
    model = build_model(kind, torch.float64)
    sites, batch = find_sites(model, which), collate(random_texts(kind, 11, 5, 8))
    trunk = Trunk(model, sites)
    hidden = trunk.run(batch)

    def loss() -> Tensor:
        logits = trunk.logits(batch, hidden)
        return per_example(token_nll(logits, batch.labels), batch.owner, 3)

    with unchanged(model):
        _, factors = capture(model, sites, loss)
    for site, expected in zip(
        sites, dense_gradients(model, sites, lambda m: nll(m, batch).sum()), strict=True
    ):
        close(rebuilt(factors[site.name]), expected)


@pytest.mark.parametrize("kind", [*SAMPLE, "opt"])
def test_each_example_has_the_factors_that_it_has_alone(kind: str) -> None:
    model = build_model(kind, torch.float64)
    sites, texts = find_sites(model), random_texts(kind, 11, 5, 8)
    batch = collate(texts)
    _, together = capture(model, sites, lambda: nll(model, batch))
    for i, text in enumerate(texts):
        alone = collate([text])
        _, single = capture(model, sites, lambda alone=alone: nll(model, alone))
        for site in sites:
            rows = together[site.name].owner == i
            assert not single[site.name].owner.any()
            # Llama's norms are computed in float32, where padding may flip the last bit.
            torch.testing.assert_close(together[site.name].u[rows], single[site.name].u, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                together[site.name].delta[rows], single[site.name].delta, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_the_tokens_that_matter(tiny_llama: LM, side: str) -> None:
    """Below the last block every token up to the last label has a gradient, in it only the label positions."""
    batch, sites = three_texts(side), find_sites(tiny_llama.model)
    trunk = Trunk(tiny_llama.model, sites)

    def loss() -> Tensor:
        logits = trunk.logits(batch)
        return per_example(token_nll(logits, batch.labels), batch.owner, 3)

    _, factors = capture(tiny_llama.model, sites, loss)
    for site in sites:
        rows = torch.bincount(factors[site.name].owner).tolist()
        assert rows == ([4, 1, 5] if site.block == 3 else [10, 4, 7]), site.name
        assert factors[site.name].owner.tolist() == sorted(factors[site.name].owner.tolist())
        assert torch.isfinite(factors[site.name].delta).all()


def test_rows_of_an_encoder_decoder() -> None:
    """In its encoder every token of the source has a gradient, in its decoder every one up to the last label."""
    model, texts = build_model("bart"), [Text((2, 0, 7, 8), 2, (5, 6, 9, 4, 3)), Text((2, 0, 6), 2, (7, 8))]
    _, factors = capture(model, find_sites(model), lambda: nll(model, collate(texts)))
    rows = {name: torch.bincount(f.owner).tolist() for name, f in factors.items()}
    last = {"model.decoder.layers.3.fc1": [2, 1], "model.decoder.layers.3.fc2": [2, 1]}  # labels only
    assert {name: count for name, count in rows.items() if "decoder.layers.3" in name} == last
    assert all(count == [3, 2] for name, count in rows.items() if "decoder.layers.2" in name)
    assert all(count == [5, 2] for name, count in rows.items() if "encoder" in name)


def test_rows_of_a_classifier() -> None:
    """In its last block only the first token, from which the class is read, has a gradient."""
    model, texts = build_model("bert"), [Text((5, 6, 9, 4, 1), 4), Text((7, 8, 0), 2)]
    _, factors = capture(model, find_sites(model), lambda: nll(model, collate(texts)))
    for name, f in factors.items():
        assert torch.bincount(f.owner).tolist() == ([1, 1] if "layer.3" in name else [4, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_factors(dtype: torch.dtype) -> None:
    model, exact = build_model("llama", dtype), build_model("llama")
    sites, batch = find_sites(model, last=1), three_texts()
    losses, factors = capture(model, sites, lambda: nll(model, batch))
    reference, wanted = capture(exact, sites, lambda: nll(exact, batch))
    torch.testing.assert_close(losses, reference, rtol=0.05, atol=0.05)
    for site in sites:
        got, want = factors[site.name], wanted[site.name]
        assert got.u.dtype == got.delta.dtype == torch.float32
        assert torch.equal(got.owner, want.owner)
        assert (rebuilt(got) - rebuilt(want)).norm() < 0.1 * rebuilt(want).norm()


def test_nothing_is_left_behind(tiny_llama: LM, tiny_gpt2: LM) -> None:
    """The fixtures check the models; here also one whose parameters ask for gradients."""
    batch = three_texts()
    for lm in (tiny_llama, tiny_gpt2):
        free = copy.deepcopy(lm.model).train().requires_grad_(True)
        sites = find_sites(free)
        for model in (lm.model, free):
            with unchanged(model), torch.no_grad():
                _, factors = capture(model, sites, lambda model=model: nll(model, batch))
                assert not torch.is_grad_enabled()
            assert not any(f.u.requires_grad or f.delta.requires_grad for f in factors.values())


def test_nothing_is_left_behind_after_an_exception(tiny_llama: LM, tiny_gpt2: LM) -> None:
    batch = three_texts()
    for lm in (tiny_llama, tiny_gpt2):
        sites = find_sites(lm.model)

        def failing(model: Any = lm.model) -> Tensor:
            nll(model, batch)
            raise ZeroDivisionError

        with unchanged(lm.model), pytest.raises(ZeroDivisionError):
            capture(lm.model, sites, failing)


def test_a_matrix_that_the_pass_does_not_run_is_named(tiny_llama: LM) -> None:
    sites = find_sites(tiny_llama.model, last=2)
    with unchanged(tiny_llama.model), pytest.raises(ModelError, match=sites[0].name):
        capture(tiny_llama.model, sites, lambda: torch.zeros(1, requires_grad=True))


def test_nothing_below_the_first_site_is_differentiated(tiny_llama: LM) -> None:
    seen: dict[int, bool] = {}
    layers: Any = tiny_llama.model.model.layers
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: seen.update({i: out.requires_grad}))
        for i, layer in enumerate(layers)
    ]
    batch = three_texts()
    try:
        capture(tiny_llama.model, find_sites(tiny_llama.model, last=2), lambda: nll(tiny_llama.model, batch))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {0: False, 1: False, 2: True, 3: True}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_rows_become_one_change_for_each_example(rows: list[int]) -> None:
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    left, right = torch.randn(len(owner), 3).double(), torch.randn(len(owner), 4).double()
    change = Factors(right, left, owner, len(rows)).lowrank(left, right)
    assert change.left.shape == (len(rows), 3, max(1, *rows, 1))
    assert change.right.shape == (len(rows), max(1, *rows, 1), 4)
    for i in range(len(rows)):
        close(change.dense()[i], left[owner == i].T @ right[owner == i])


def test_rows_carry_gradients_to_what_made_them() -> None:
    owner = torch.tensor([0, 0, 2])
    left, right = torch.randn(3, 2, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    Factors(right, left, owner, 3).lowrank(left, right).sum().dense().sum().backward()
    torch.testing.assert_close(left.grad, right.detach().sum(1, keepdim=True).expand(3, 2))
    torch.testing.assert_close(right.grad, left.detach().sum(1, keepdim=True).expand(3, 4))


def test_move() -> None:
    moved = move(
        {"a": Factors(torch.ones(1, 2), torch.ones(1, 3), torch.zeros(1).long(), 1)}, torch.device("meta")
    )
    assert moved["a"].u.device == moved["a"].delta.device == moved["a"].owner.device == torch.device("meta")
    assert moved["a"].examples == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_wherever_it_stands(bad: float) -> None:
    values = [torch.ones(3, 4), torch.full((2,), 3e38)]  # their sum is not finite, each of them is
    assert all_finite(values)
    for place in range(2):
        broken = [value.clone() for value in values]
        broken[place].view(-1)[-1] = bad
        assert not all_finite(broken)
    assert not all_finite([torch.tensor([bad, -bad])])
