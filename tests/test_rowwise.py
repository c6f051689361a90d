"""Rows out of a matrix and back into one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from emendo.rowwise import put, take


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
