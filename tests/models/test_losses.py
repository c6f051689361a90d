"""Losses against slow, obvious references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emendo.models.losses import per_example, token_kl, token_margin, token_nll


def test_token_nll_is_minus_the_log_of_the_probability() -> None:
    logits, labels = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    expected = [-math.log(torch.softmax(row, 0)[label]) for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(token_nll(logits, labels), torch.tensor(expected, dtype=torch.float64))


def test_the_margin_is_what_the_best_other_answer_has_more() -> None:
    logits, labels = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 5
    expected = []
    for p, label in zip(logits.softmax(-1).tolist(), labels.tolist(), strict=True):
        best = max(value for answer, value in enumerate(p) if answer != label)
        expected.append(max(0.0, math.log(best) - math.log(p[label])))
    torch.testing.assert_close(token_margin(logits, labels), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(token_margin(logits, labels) == 0, logits.argmax(-1) == labels)
    assert torch.autograd.gradcheck(lambda x: token_margin(x, labels[:6]), logits[:6].requires_grad_())


def test_token_kl_is_the_definition() -> None:
    before, after = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = []
    for p, q in zip(before.softmax(-1).tolist(), after.softmax(-1).tolist(), strict=True):
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    torch.testing.assert_close(token_kl(before, after), torch.tensor(expected, dtype=torch.float64))
    assert (token_kl(before, after) > 0).all()
    assert torch.equal(token_kl(before, before), torch.zeros(4, dtype=torch.float64))


def test_the_reference_of_the_kl_carries_no_gradient() -> None:
    before, after = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    token_kl(before, after).sum().backward()
    assert before.grad is None
    assert after.grad is not None
    torch.testing.assert_close(after.grad, (after.softmax(-1) - before.softmax(-1)).detach())


def test_the_gradient_of_the_kl_is_that_of_finite_differences() -> None:
    before, after = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_kl(before, x), after.requires_grad_())


def test_logits_of_half_precision_get_a_gradient_of_their_own_kind() -> None:
    before, after = torch.randn(2, 5).bfloat16(), torch.randn(2, 5).bfloat16().requires_grad_()
    assert token_kl(before, after).dtype == torch.float32
    token_kl(before, after).sum().backward()
    assert after.grad is not None
    assert after.grad.dtype == torch.bfloat16
    expected = after.float().softmax(-1) - before.float().softmax(-1)
    torch.testing.assert_close(after.grad.float(), expected.detach(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(3, 50, dtype=dtype), torch.tensor([1, 2, 3])
    assert torch.equal(token_nll(logits, labels), token_nll(logits.float(), labels))
    assert token_kl(logits, logits + 1).dtype == torch.float32


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_an_example_is_the_mean_of_its_own_positions(counts: list[int]) -> None:
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    values = torch.randn(len(owner))
    expected = torch.stack([part.mean() for part in values.split(counts)])
    torch.testing.assert_close(per_example(values, owner, len(counts)), expected)
    shuffled = torch.randperm(len(owner))
    torch.testing.assert_close(per_example(values[shuffled], owner[shuffled], len(counts)), expected)


def test_an_example_without_a_position_has_no_loss() -> None:
    assert per_example(torch.tensor([2.0]), torch.tensor([1]), 3).tolist() == [0, 2, 0]
