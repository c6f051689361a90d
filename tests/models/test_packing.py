"""MLPs that compute only the rows that matter give the results of the whole padded batch, in every architecture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cases import ARCHITECTURES, build_lm, random_texts, unchanged
from emendo.editors.gradient import edit_factors
from emendo.low_rank import LowRank, applied
from emendo.models._packing import applied_to_texts, packable, padded_count, put, take
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text, collate
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

LENGTHS = (9, 12, 7, 11)  # padding no longer than the windows of local attention


def _setting(kind: str) -> tuple[LM, tuple[Site, ...], TrunkCache, list[Text]]:
    lm = build_lm(kind, torch.float64)
    sites = find_sites(lm.model, last=2)
    texts = random_texts(kind, *LENGTHS)
    store = TrunkCache(Trunk(lm.model, sites), dtype=torch.float64)
    store.ensure(texts)
    return lm, sites, store, texts


def _changes(sites: tuple[Site, ...], edits: int = 2, rank: int = 3) -> dict[str, LowRank]:
    return {
        site.name: LowRank(
            (torch.randn(edits, site.d_out, rank, dtype=torch.float64) * 0.1).requires_grad_(),
            (torch.randn(edits, rank, site.d_in, dtype=torch.float64) * 0.1).requires_grad_(),
        )
        for site in sites
    }


@pytest.mark.parametrize("own", [(1, 0, 0, 1), (0, 0, 0, 0)], ids=["two edits", "one edit"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_edited_texts_have_the_logits_and_gradients_of_a_padded_batch(
    kind: str, own: tuple[int, ...]
) -> None:
    lm, sites, store, texts = _setting(kind)
    changes = _changes(sites, len(set(own)))
    edit = torch.tensor(own)
    with unchanged(lm.model):
        _, found = store.packed_logits(
            texts, lambda packing: applied_to_texts(lm.model, changes, edit, packing)
        )
        with applied(lm.model, {name: change.take(edit) for name, change in changes.items()}):
            _, expected = store.logits(texts)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        leaves = [leaf for change in changes.values() for leaf in (change.left, change.right)]
        weights = torch.randn_like(found)
        ours = torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_factors_are_those_of_a_padded_batch(kind: str) -> None:
    lm, sites, store, texts = _setting(kind)
    hidden = store.gather(texts)
    with unchanged(lm.model):
        found = edit_factors(store.trunk, sites, texts, hidden, packed=True)
        expected = edit_factors(store.trunk, sites, texts, hidden)
    for name, factors in expected.items():
        assert found[name].owner.tolist() == factors.owner.tolist()
        torch.testing.assert_close(found[name].u, factors.u, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[name].delta, factors.delta, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "where"),
    [("llama", "mlp"), ("gpt2", "mlp"), ("gptj", "mlp"), ("t5", "DenseReluDense"), ("bert", "intermediate")],
)
def test_mlps_are_found_by_what_they_hold(kind: str, where: str) -> None:
    model = build_lm(kind).model
    found = packable(model, find_sites(model, last=2))
    assert found and all(parent.endswith(where) for parent in found.values())


def test_no_block_is_taken_for_an_mlp_and_no_attention() -> None:
    model = build_lm("opt").model
    assert packable(model, find_sites(model)) == {}
    llama = build_lm("llama").model
    assert packable(llama, find_sites(llama, "attention")) == {}


@pytest.mark.parametrize("extra", [nn.LayerNorm(32), nn.ZeroPad2d((0, 0, 1, -1)), nn.Conv1d(4, 4, 3)])
def test_a_module_that_may_mix_positions_is_left_alone(extra: nn.Module) -> None:
    model = build_lm("llama").model
    site = find_sites(model, last=1)
    model.get_submodule(site[0].name.rpartition(".")[0]).add_module("extra", extra)
    assert packable(model, site) == {}


def test_the_last_block_sees_the_labels_alone() -> None:
    lm, sites, store, texts = _setting("llama")
    seen: dict[str, int] = {}
    handles = [
        site.module(lm.model).register_forward_hook(
            lambda module, args, output, name=site.name: seen.update({name: args[0].shape[1]})
        )
        for site in sites
    ]
    store.packed_logits(texts)
    for handle in handles:
        handle.remove()
    deepest = max(site.block for site in sites)
    for site in sites:
        expected = sum(len(t.labels) if site.block == deepest else len(t.inputs) for t in texts)
        assert seen[site.name] == expected


def test_half_precision_sees_a_few_rows_more_and_gives_the_same() -> None:
    """Rows of padding and of no label go along; no factor comes from them."""
    model = build_lm("llama", torch.bfloat16).model
    sites = find_sites(model, last=2)
    trunk = Trunk(model, sites)
    texts = [*random_texts("llama", 20, 9, 7), Text((5, 6, 7, 8, 9), 3)]
    batch = collate(texts)
    packing, matter = trunk.packing(batch), trunk.relevant_rows(batch)
    for name, rows in packing.sites.items():
        own = matter[name]
        assert len(rows.index) % 32 == 0
        assert len(rows.index) > len(own.index)
        assert rows.index[: len(own.index)].equal(own.index)
        assert len(rows.index.unique()) == len(rows.index)
        assert rows.owner.equal(rows.index // batch.input_ids.shape[1])
    hidden = trunk.run(batch)
    found, whole = trunk.logits(batch, hidden, packing), trunk.logits(batch, hidden)
    torch.testing.assert_close(found, whole, rtol=0.02, atol=0.06)
    few, all_rows = (edit_factors(trunk, sites, texts, hidden, packed=packed) for packed in (True, False))
    for site in sites:
        assert few[site.name].owner.equal(all_rows[site.name].owner)
        torch.testing.assert_close(few[site.name].u, all_rows[site.name].u, rtol=0.05, atol=0.05)


@given(st.integers(1, 9), st.data())
def test_rows_taken_are_those_indexed_and_put_back_stand_where_they_were(
    count: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    rows, index = torch.randn(count, 3, dtype=torch.float64), torch.tensor(places, dtype=torch.long)
    taken = take(rows, index)
    assert torch.equal(taken, rows[index])
    expected = torch.zeros_like(rows)
    expected[index] = rows[index]
    assert torch.equal(put(taken, index, count), expected)


def test_gradients_of_both_orders() -> None:
    rows, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 2])
    short = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for of, value in ((lambda x: take(x, index), rows), (lambda x: put(x, index, 6), short)):
        assert torch.autograd.gradcheck(of, value)
        assert torch.autograd.gradgradcheck(lambda x, of=of: of(x).square(), value)


@pytest.mark.parametrize(
    ("dtype", "device", "wanted"),
    [
        (torch.bfloat16, "cpu", [0, 32, 32, 64]),
        (torch.float16, "cpu", [0, 32, 32, 64]),
        (torch.float32, "cpu", [0, 1, 32, 33]),
        (torch.float64, "cpu", [0, 1, 32, 33]),
        (torch.bfloat16, "meta", [0, 1, 32, 33]),
    ],
)
def test_rows_are_filled_up_where_each_number_is_compiled(
    dtype: torch.dtype, device: str, wanted: list[int]
) -> None:
    like = torch.empty(1, dtype=dtype, device=device)
    assert [padded_count(count, like) for count in (0, 1, 32, 33)] == wanted
