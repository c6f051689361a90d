"""Low-rank algebra against dense matrices, and changes applied beside a model's weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import ARCHITECTURES, VOCABULARY, build_lm, build_model, plain_logits, random_texts, unchanged
from emendo.errors import RequestError
from emendo.low_rank import LowRank, RowGroups, applied
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import collate

sizes = st.integers(1, 6)


@st.composite
def changes(draw: st.DrawFn, batched: bool = False) -> LowRank:
    """A change in float64, sometimes of lower rank than it has columns."""
    d_out, d_in, rank, examples = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = (examples,) if batched else ()
    left = torch.randn(*lead, d_out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(*lead, rank, d_in, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        left[..., 0] = left[..., -1]
    return LowRank(left, right)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(changes(), sizes)
def test_applied_to_rows(change: LowRank, rows: int) -> None:
    x = torch.randn(2, rows, change.right.shape[-1], dtype=torch.float64)
    close(change(x), x @ change.dense().T)


@given(changes(batched=True), sizes)
def test_applied_to_rows_one_change_for_each_example(change: LowRank, rows: int) -> None:
    assert change.batched
    x = torch.randn(len(change.left), rows, change.right.shape[-1], dtype=torch.float64)
    expected = torch.stack([row @ dense.T for row, dense in zip(x, change.dense(), strict=True)])
    close(change(x), expected)


@given(changes(), st.floats(-3, 3))
def test_sum_and_scale(change: LowRank, factor: float) -> None:
    other = LowRank(change.left.flip(-1), change.right * 0.5)
    both = change + other
    assert both.rank == change.rank + other.rank
    close(both.dense(), change.dense() + other.dense())
    close(change.scale(factor).dense(), factor * change.dense())
    assert not both.batched


@given(changes(batched=True))
def test_sum_over_examples(change: LowRank) -> None:
    total = change.sum()
    assert not total.batched
    assert total.rank == len(change.left) * change.rank
    close(total.dense(), change.dense().sum(0))
    assert total.sum() is total
    close(change[0].dense(), change.dense()[0])
    close(change[torch.tensor([-1])].dense(), change.dense()[-1:])
    close(change.take(torch.tensor([0, 0])).dense(), change.dense()[:1].expand(2, -1, -1))


@given(changes(), changes(batched=True))
def test_norm(one: LowRank, several: LowRank) -> None:
    close(one.norm(), one.dense().norm())
    close(several.norm(), several.dense().norm(dim=(-2, -1)))


@given(changes(), sizes)
def test_compact_to_a_rank_loses_exactly_the_tail_of_the_singular_values(change: LowRank, rank: int) -> None:
    values = torch.linalg.svdvals(change.dense())
    compact = change.compact(rank)
    assert compact.rank <= rank
    close((compact.dense() - change.dense()).norm(), values[rank:].norm())


@given(changes(), st.floats(0, 0.9))
def test_compact_to_a_tolerance_keeps_as_few_columns_as_it_may(change: LowRank, tolerance: float) -> None:
    values = torch.linalg.svdvals(change.dense())
    compact = change.compact(tolerance=tolerance)
    error, norm = (compact.dense() - change.dense()).norm(), values.norm()
    assert error <= tolerance * norm + 1e-10
    if compact.rank > 1:  # one column fewer would be too few
        assert values[compact.rank - 1 :].norm() > tolerance * norm


@given(changes())
def test_compact_loses_nothing_by_default_and_balances_the_factors(change: LowRank) -> None:
    compact = change.compact()
    close(compact.dense(), change.dense())
    assert compact.rank == torch.linalg.matrix_rank(change.dense())
    close(compact.left.T @ compact.left, compact.right @ compact.right.T)


def test_the_tolerance_is_for_all_that_is_dropped_together() -> None:
    same = LowRank(torch.eye(4), torch.eye(4))  # four singular values of 1, so a norm of 2
    assert [same.compact(tolerance=t).rank for t in (0.4, 0.6, 0.75, 0.9)] == [4, 3, 2, 1]


def test_compact_of_nothing_and_of_several() -> None:
    zero = LowRank(torch.zeros(3, 2), torch.zeros(2, 4))
    assert zero.compact().rank == 1
    assert not zero.compact().dense().any()
    assert zero.norm() == 0
    with pytest.raises(ValueError, match="sum"):
        LowRank(torch.zeros(2, 3, 1), torch.zeros(2, 1, 4)).compact()


def test_to_moves_both_factors() -> None:
    moved = LowRank(torch.ones(3, 1), torch.ones(1, 2)).to(torch.bfloat16)
    assert moved.left.dtype == moved.right.dtype == torch.bfloat16
    assert (
        LowRank(torch.ones(3, 1), torch.ones(1, 2))(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    )


# ------------------------------------------------------------------------------------ beside a model


def random_changes(
    sites: tuple[Site, ...], size: float, dtype: torch.dtype, examples: int = 0
) -> dict[str, LowRank]:
    """A random change of rank 3 for each site, or one for each example."""
    lead = (examples,) if examples else ()
    return {
        site.name: LowRank(
            size * torch.randn(*lead, site.d_out, 3, dtype=dtype),
            torch.randn(*lead, 3, site.d_in, dtype=dtype),
        )
        for site in sites
    }


def merged(model: Any, sites: tuple[Site, ...], deltas: dict[str, LowRank], dtype: torch.dtype) -> Any:
    """A copy with the dense changes added to the weights."""
    dense = copy.deepcopy(model).to(dtype)
    for site in sites:
        site.weight(dense).add_(deltas[site.name].dense().to(dtype))
    return dense


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_hook_equals_the_dense_change_of_the_weight(kind: str) -> None:
    model = build_model(kind, torch.float64)
    sites = find_sites(model, "all")
    deltas = random_changes(sites, 0.05, torch.float64)
    batch = collate(random_texts(kind, 7, 5))
    with unchanged(model), applied(model, deltas):
        hooked = plain_logits(model, batch)
    expected = plain_logits(merged(model, sites, deltas, torch.float64), batch)
    # Llama's kin compute their norms in float32 whatever the model's dtype.
    torch.testing.assert_close(hooked, expected, rtol=1e-5, atol=1e-5)
    assert (hooked - plain_logits(model, batch)).abs().max() > 0.1  # and it is a change that shows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "bert", "distilbert"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Relative to the largest logit; a few units in the last place of the dtype, gathered over three blocks.
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
)
def test_hook_equals_the_dense_change_in_every_dtype(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = build_model(kind, dtype)
    sites = find_sites(model)
    deltas = random_changes(sites, 0.02, torch.float64)
    batch = collate(random_texts(kind, 7, 5))
    before = plain_logits(model, batch)
    with unchanged(model), applied(model, deltas):
        hooked = plain_logits(model, batch)
    assert hooked.dtype == dtype
    assert torch.equal(plain_logits(model, batch), before)  # undone bit for bit
    expected = plain_logits(merged(model, sites, deltas, torch.float64), batch)
    assert (hooked.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_row_of_the_batch_gets_its_own_change(kind: str) -> None:
    model = build_model(kind)
    sites = find_sites(model)
    deltas = random_changes(sites, 0.05, torch.float32, examples=3)
    texts = random_texts(kind, 7, 5, 6)
    batch = collate(texts)
    with applied(model, deltas):
        together = plain_logits(model, batch)
    for row, text in enumerate(texts):
        with applied(model, {name: delta[row] for name, delta in deltas.items()}):
            alone = plain_logits(model, collate([text]))
        torch.testing.assert_close(together[batch.owner == row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_with_respect_to_the_factors_is_that_of_the_dense_weight(kind: str) -> None:
    model = build_model(kind, torch.float64)
    sites = find_sites(model, last=2)
    deltas = random_changes(sites, 0.05, torch.float64)
    ids = torch.randint(VOCABULARY, (2, 5))
    factors = [factor.requires_grad_() for d in deltas.values() for factor in (d.left, d.right)]
    with applied(model, deltas):
        hooked = torch.autograd.grad(model(ids).logits.sin().sum(), factors)

    dense = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites:
            site.weight(dense).add_(deltas[site.name].dense())
    weights = [site.module(dense).weight.requires_grad_() for site in sites]
    gradients = torch.autograd.grad(dense(ids).logits.sin().sum(), weights)
    for i, (site, gradient) in enumerate(zip(sites, gradients, strict=True)):
        whole = gradient.T if site.transposed else gradient
        close(hooked[2 * i], whole @ deltas[site.name].right.T)
        close(hooked[2 * i + 1], deltas[site.name].left.T @ whole)


def test_nothing_stays_after_an_exception(tiny_llama: LM) -> None:
    sites = find_sites(tiny_llama.model)
    deltas = random_changes(sites, 0.1, torch.float32)
    bad = torch.full((1, 3), VOCABULARY)
    with pytest.raises(IndexError), unchanged(tiny_llama.model), applied(tiny_llama.model, deltas):
        tiny_llama.model(bad)
    with (
        pytest.raises(AttributeError),
        unchanged(tiny_llama.model),
        applied(tiny_llama.model, {**deltas, "no.such.module": deltas[sites[0].name]}),
    ):
        pass


def test_two_changes_at_once_add_up() -> None:
    lm = build_lm("llama", torch.float64)
    sites = find_sites(lm.model, last=1)
    first, second = (random_changes(sites, 0.05, torch.float64) for _ in range(2))
    ids = torch.randint(VOCABULARY, (1, 6))
    with applied(lm.model, first), applied(lm.model, second):
        stacked = lm.model(ids).logits
    with applied(lm.model, {name: first[name] + second[name] for name in first}):
        close(lm.model(ids).logits, stacked)


@pytest.mark.parametrize(
    "groups", [[(2, 0), (3,)], [(0, 1), (2,), (3,)]], ids=["row 1 in no group", "all rows"]
)
@pytest.mark.parametrize("flat", [False, True])
def test_each_group_of_rows_gets_its_change(groups: list[tuple[int, ...]], flat: bool) -> None:
    """As one row after the other, with the same gradients; also where a model flattens its tokens."""
    changes = [
        LowRank(torch.randn(5, rank, dtype=torch.float64), torch.randn(rank, 3, dtype=torch.float64))
        for rank in (1, 2, 3)[: len(groups)]
    ]
    leaves = [leaf.requires_grad_() for change in changes for leaf in (change.left, change.right)]
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = RowGroups(4, list(zip(groups, changes, strict=True)))
    found = rows(x.flatten(0, 1) if flat else x)
    expected = torch.zeros(4, 2, 5, dtype=torch.float64)
    for members, change in zip(groups, changes, strict=True):
        for row in members:
            expected = expected.index_add(0, torch.tensor([row]), change(x[row])[None])
    close(found, expected)
    weights = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), [x, *leaves]) for y in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


def test_a_row_in_no_group_keeps_every_bit() -> None:
    matrix = torch.nn.Linear(3, 4)
    with torch.no_grad():
        matrix.weight.zero_(), matrix.bias.copy_(torch.tensor([0.0, -0.0, torch.inf, 1e-45]))
        rows = RowGroups(2, [((1,), LowRank(torch.ones(4, 1), torch.ones(1, 3)))])
        x = torch.ones(2, 3)
        before = matrix(x)
        with applied(torch.nn.ModuleDict({"m": matrix}), {"m": rows}):
            after = matrix(x)
    assert torch.equal(after[0].view(torch.int32), before[0].view(torch.int32))
    assert torch.equal(after[1], before[1] + 3)


def test_another_number_of_rows_is_refused() -> None:
    rows = RowGroups(2, [((0,), LowRank(torch.ones(4, 1), torch.ones(1, 3)))])
    with pytest.raises(RequestError, match=r"2 rows.* batch of 3"):
        rows(torch.ones(3, 5, 3))
