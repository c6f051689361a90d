"""Losses behind a vocabulary projection against the same from whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emendo.models._projection_loss import Expected, divergence
from emendo.models.losses import token_kl, token_nll

WIDTH, VOCABULARY, WANTED, KEPT = 12, 50, 5, 13  # more rows than go through the elementwise passes at a time


def projection(bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)


def rows(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(bias: bool) -> None:
    head = projection(bias)
    labels, before = torch.arange(WANTED) * 7, rows(KEPT, 1)
    seen = rows(WANTED + KEPT, 2).requires_grad_()
    weights = torch.randn(WANTED + KEPT, dtype=torch.float64)

    values, right = divergence(
        head, seen, Expected.from_labels(head, labels).concatenate(Expected.from_rows(head, before))
    )
    (gradient,) = torch.autograd.grad(values @ weights, seen)

    logits = head(seen)
    expected = torch.cat([token_nll(logits[:WANTED], labels), token_kl(head(before), logits[WANTED:])])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected @ weights, seen)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert right.equal(logits.argmax(-1) == torch.cat([labels, head(before).argmax(-1)]))


def test_the_gradient_is_that_of_finite_differences() -> None:
    head, expected = projection(bias=True), rows(3, 1)
    goal = Expected.from_rows(head, expected)
    assert torch.autograd.gradcheck(lambda x: divergence(head, x, goal)[0], rows(3, 2).requires_grad_())


def test_nothing_changed_is_no_divergence() -> None:
    head, same = projection(bias=True), rows(KEPT, 1).requires_grad_()
    values, right = divergence(head, same, Expected.from_rows(head, same.detach()))
    assert values.abs().max() < 1e-12
    assert right.all()
    (gradient,) = torch.autograd.grad(values.sum(), same)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """The error is of the size of the format's, not of the logits."""
    exact = projection(bias=False)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(exact.weight)
    exact.weight.copy_(head.weight)
    found = []
    for of, kind in ((head, dtype), (exact, torch.float64)):
        seen = rows(WANTED + KEPT, 2, dtype).to(kind).requires_grad_()
        goal = Expected.from_labels(of, torch.arange(WANTED)).concatenate(
            Expected.from_rows(of, rows(KEPT, 1, dtype).to(kind))
        )
        values, _ = divergence(of, seen, goal)
        assert values.dtype == torch.promote_types(kind, torch.float32)
        (gradient,) = torch.autograd.grad(values.sum(), seen)
        assert gradient.dtype == kind
        found.append((values.double(), gradient.double()))
    assert found[1][0].max() > 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_what_is_kept_is_a_table() -> None:
    head = projection(bias=True)
    goal = Expected.from_rows(head, rows(KEPT, 1))
    again = Expected.unpack(goal.pack())
    assert again.token.equal(goal.token)
    assert again.row.equal(goal.row)
    assert again.constant.equal(goal.constant)


def test_no_row_at_all() -> None:
    head, none = projection(bias=False), rows(0, 1).requires_grad_()
    values, right = divergence(head, none, Expected.from_labels(head, torch.zeros(0, dtype=torch.long)))
    assert values.shape == right.shape == (0,)
    assert torch.autograd.grad(values.sum(), none)[0].shape == (0, WIDTH)
