"""Regularised least squares against dense solves in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emendo.least_squares import (
    NormalEquations,
    RecursiveLeastSquares,
    change_of,
    change_of_two_sides,
    solve,
)

torch.manual_seed(0)
D_IN, D_OUT = 7, 4


def drawn(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, what they shall get, and a ridge."""
    made = torch.randn(3 * D_IN, D_IN, dtype=torch.float64)
    x, y = (torch.randn(rows, d, dtype=torch.float64) for d in (D_IN, D_OUT))
    return x, y, made.mT @ made / len(made)


def reference(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    return (torch.linalg.inv(x.mT @ x + ridge) @ x.mT @ y).mT


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_change_is_the_dense_solution(rows: int) -> None:
    x, y, ridge = drawn(rows)
    found = change_of(x, y, ridge)
    assert found.rank == rows
    torch.testing.assert_close(found.dense(), reference(x, y, ridge))


def test_streamed_rows_give_what_all_rows_give_at_once() -> None:
    x, y, ridge = drawn(40)
    equations = NormalEquations(ridge, D_OUT)
    for part, own in zip(x.split(7), y.split(7), strict=True):
        equations.add(part, own)
    torch.testing.assert_close(equations.change(), reference(x, y, ridge))


def test_rows_that_come_and_go_leave_the_solution_for_the_others() -> None:
    x, y, ridge = drawn(30)
    running = RecursiveLeastSquares.start(ridge, D_OUT)
    for at in range(0, 30, 6):
        running.add(x[at : at + 6], y[at : at + 6])
    torch.testing.assert_close(running.change, reference(x, y, ridge))
    running.remove(x[6:12], y[6:12])
    rest = torch.tensor([*range(6), *range(12, 30)])
    torch.testing.assert_close(running.change, reference(x[rest], y[rest], ridge))
    torch.testing.assert_close(running.inverse, torch.linalg.inv(x[rest].mT @ x[rest] + ridge))


@pytest.mark.parametrize("rows", [3, 40])
def test_both_sides_are_weighed_as_the_kronecker_product_says(rows: int) -> None:
    """The reference solves for all entries of the change at once."""
    x, y, inputs = drawn(rows)
    made = torch.randn(9, D_OUT, dtype=torch.float64)
    outputs = made.mT @ made
    eye = torch.eye(D_OUT, dtype=torch.float64)
    system = torch.kron(eye, x.mT @ x) + torch.kron(outputs, inputs)
    expected = torch.linalg.solve(system, (y.mT @ x).flatten()).view(D_OUT, D_IN)
    torch.testing.assert_close(change_of_two_sides(x, y, inputs, outputs), expected)
    torch.testing.assert_close(change_of_two_sides(x, y, inputs, eye), reference(x, y, inputs))


def test_a_singular_system_is_solved_where_it_has_a_solution() -> None:
    x = torch.randn(3, D_IN, dtype=torch.float64)
    system = x.mT @ x
    right = system @ torch.randn(D_IN, 2, dtype=torch.float64)
    torch.testing.assert_close(system @ solve(system, right), right)
    assert solve(torch.zeros(D_IN, D_IN), right).eq(0).all()


def test_a_badly_conditioned_system_gives_finite_numbers_that_solve_it() -> None:
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN, dtype=torch.float64))[0]
    values = torch.logspace(0, -18, D_IN, dtype=torch.float64)
    system = basis @ torch.diag(values) @ basis.mT
    wanted = basis[:, :2]
    found = solve(system, system @ wanted)
    assert found.isfinite().all()
    torch.testing.assert_close(system @ found, system @ wanted, atol=1e-12, rtol=1e-6)
