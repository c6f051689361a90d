"""The residual low-rank block and the running statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from emendo.editors._nets import LowRankBlock, RunningStats


def close(found: Tensor, expected: object, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance
    )


# --------------------------------------------------------------------------------- running statistics


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2),
    st.floats(-100, 100),
    st.floats(0.01, 100),
)
def test_statistics_equal_numpy_however_the_rows_are_cut(
    sizes: list[int], offset: float, spread: float
) -> None:
    rows = torch.randn(sum(sizes), 3) * spread + offset
    stats = RunningStats(3)
    for part in rows.split(sizes):
        stats.update(part)
    whole = rows.numpy().astype(np.float64)
    scale = abs(offset) + spread
    assert stats.count == len(rows)
    close(stats.mean / scale, whole.mean(0) / scale)
    close(stats.std() / scale, whole.std(0, ddof=1) / scale)


def test_statistics_of_one_row_at_a_time_equal_those_of_the_whole() -> None:
    rows = torch.randn(500, 4) * torch.tensor([1e-4, 1.0, 10.0, 0.0]) + torch.tensor([0.0, 5.0, -3.0, 2.0])
    one, all_at_once = RunningStats(4), RunningStats(4)
    for row in rows:
        one.update(row[None])
    all_at_once.update(rows)
    whole = rows.numpy().astype(np.float64)
    for stats in (one, all_at_once):
        close(stats.mean, whole.mean(0), 1e-12)
        close(stats.std(), whole.std(0, ddof=1), 1e-12)


def test_statistics_far_from_zero_do_not_cancel() -> None:
    rows = torch.randn(300, 2) + 10_000
    stats = RunningStats(2)
    for part in rows.split(7):
        stats.update(part)
    close(stats.std(), rows.numpy().astype(np.float64).std(0, ddof=1), 1e-10)


def test_normalised_rows() -> None:
    stats, rows = RunningStats(2), torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    stats.update(rows)
    # mean (2, 5), standard deviation (sqrt 2, 0); a feature that never varies stays at zero
    close(stats(rows), [[-(0.5**0.5), 0.0], [0.5**0.5, 0.0]])


def test_before_the_second_row_nothing_is_scaled() -> None:
    stats = RunningStats(2)
    close(stats(torch.tensor([[3.0, -4.0]])), [[3.0, -4.0]])
    stats.update(torch.zeros(0, 2))
    assert stats.count == 0
    stats.update(torch.tensor([[1.0, 2.0]]))
    close(stats(torch.tensor([[3.0, -4.0]])), [[2.0, -6.0]])


def test_every_number_is_a_buffer_so_a_restored_one_goes_on_alike() -> None:
    rows = torch.randn(40, 3)
    straight, first, second = RunningStats(3), RunningStats(3), RunningStats(3)
    for part in rows.split(8):
        straight.update(part)
    for part in rows[:16].split(8):
        first.update(part)
    second.load_state_dict(first.state_dict())
    for part in rows[16:].split(8):
        second.update(part)
    assert not list(straight.parameters())
    for name, tensor in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


# --------------------------------------------------------------------------------------------- block


def filled(block: LowRankBlock) -> LowRankBlock:
    """The block with every parameter random, as after training."""
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def backward_through(block: LowRankBlock, parts: list[Tensor]) -> list[Tensor]:
    """The rows of each mode through the block."""
    sizes = [len(part) for part in parts]
    return list(block(torch.cat(parts), sizes).split(sizes))


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("modes", [0, 2])
def test_gradients_are_those_of_finite_differences_and_of_autograd(identity: bool, modes: int) -> None:
    """The gradient that is written out, in float64."""
    block = filled(LowRankBlock(5, 3, modes, identity=identity)).double()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    sizes = [4, 2] if modes else [6]
    assert torch.autograd.gradcheck(lambda *_: block(x, sizes), (x, *block.parameters()))

    pre = (x @ block.v.T) @ block.u.T + block.bias
    if block.scale is not None and block.shift is not None:
        owner = torch.tensor([0, 0, 0, 0, 1, 1])
        pre = pre * block.scale[owner] + block.shift[owner]
    expected = pre.clamp(min=0) + (x if identity else 0)
    weight, held = torch.randn(6, 5, dtype=torch.float64), [x, *block.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((block(x, sizes) * weight).sum(), held),
        torch.autograd.grad((expected * weight).sum(), held),
    )


def test_block_starts_as_the_identity() -> None:
    rows = [torch.randn(3, 6), torch.randn(2, 6)]
    for found, row in zip(backward_through(LowRankBlock(6, 4, modes=2), rows), rows, strict=True):
        assert torch.equal(found, row)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("modes", [0, 2])
def test_block_is_the_equation(identity: bool, modes: int) -> None:
    """Eq. 3a, row by row."""
    block = filled(LowRankBlock(5, 3, modes, identity=identity)).double()
    parts = [torch.randn(4, 5).double(), torch.randn(2, 5).double()]
    for mode, (part, found) in enumerate(zip(parts, backward_through(block, parts), strict=True)):
        for x, y in zip(part, found, strict=True):
            pre = block.u @ (block.v @ x) + block.bias
            if block.scale is not None and block.shift is not None:
                pre = block.scale[mode] * pre + block.shift[mode]
            expected = torch.relu(pre) + (x if identity else 0)
            torch.testing.assert_close(y, expected)


def test_clamp_learns_from_the_start_where_relu_never_would() -> None:
    block, x = LowRankBlock(4, 2, modes=1), torch.randn(3, 4)
    block(x, [3]).sum().backward()
    assert block.u.grad is not None
    assert block.u.grad.abs().sum() > 0
    assert block.bias.grad is not None
    assert torch.equal(block.bias.grad, torch.full((4,), 3.0))
    assert block.shift is not None
    assert block.shift.grad is not None
    assert torch.equal(block.shift.grad, torch.full((1, 4), 3.0))

    pre = torch.zeros(4, requires_grad=True)  # what the pre-activation is at the start
    torch.relu(pre).sum().backward()
    assert pre.grad is not None
    assert not pre.grad.any()


def test_start_without_identity_is_xavier_and_not_residual() -> None:
    block = LowRankBlock(64, 32, modes=0, identity=False)
    bound = (6 / (64 + 32)) ** 0.5
    for matrix, gain in ((block.u, 2**0.5), (block.v, 1.0)):
        assert matrix.abs().max() <= gain * bound
        assert matrix.abs().max() > 0.9 * gain * bound
    found = block(torch.randn(100, 64), [100])
    assert (found >= 0).all()
    assert (found > 0).any()


def test_rank_is_at_most_the_width_and_modes_have_their_own_scale_and_offset() -> None:
    block = LowRankBlock(6, 100, modes=3)
    assert block.v.shape == (6, 6)
    assert block.scale is not None
    assert block.scale.shape == (3, 6)
    assert LowRankBlock(6, 2, modes=0).scale is None
    assert sum(p.numel() for p in LowRankBlock(6, 2, modes=3).parameters()) == 2 * 6 * 2 + 6 + 2 * 3 * 6


def test_modes_differ_only_by_scale_and_offset() -> None:
    block, x = filled(LowRankBlock(4, 2, modes=2)), torch.randn(3, 4)
    a, b = backward_through(block, [x, x])
    assert not torch.equal(a, b)
    assert block.scale is not None
    assert block.shift is not None
    with torch.no_grad():
        block.scale[1], block.shift[1] = block.scale[0], block.shift[0]
    a, b = backward_through(block, [x, x])
    assert torch.equal(a, b)
