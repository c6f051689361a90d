"""Rows out of a matrix and back into one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emendo.models._packing import even, put, take


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
    assert [even(count, like) for count in (0, 1, 32, 33)] == wanted
