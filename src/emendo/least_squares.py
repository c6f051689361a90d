"""Regularised least squares for changes of a matrix: at once, from streamed rows, and with rows added or removed.

For rows ``x_i`` (inputs of a matrix) and ``y_i`` (what the change shall add to its outputs)::

    D = argmin  sum_i ||D x_i - y_i||^2 + tr(D R D^T)  =  Y^T X (X^T X + R)^-1

Everything is solved in float64 by Cholesky's decomposition, after a check of the condition: a system with a condition
number above 1e14 gets a ridge that brings it there, and one without a decomposition is solved in its eigenbasis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from emendo.low_rank import LowRank

_CONDITION = 1e14


def solve(system: Tensor, right: Tensor) -> Tensor:
    """``system^-1 right`` for a symmetric positive semidefinite ``system [d, d]``, in float64.

    Args:
        system: the matrix.
        right: columns ``[d, m]``.
    """
    system = system.double()
    scale = float(system.diagonal().mean())
    if not scale > 0:
        return torch.zeros_like(right, dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal().square()
    if int(info) == 0 and float(pivots.max()) <= _CONDITION * float(pivots.min()):
        return torch.cholesky_solve(right.double(), factor)
    values, vectors = torch.linalg.eigh((system + system.mT) / 2)
    values = values.clamp(min=float(values.max()) / _CONDITION)
    found: Tensor = vectors @ ((vectors.mT @ right.double()) / values[:, None])
    return found


def change_of(x: Tensor, y: Tensor, ridge: Tensor) -> LowRank:
    """The change of rank ``n`` for rows ``x [n, d_in]`` and ``y [n, d_out]``, with a ridge ``R [d_in, d_in]``."""
    wide = x.double()
    return LowRank(y.double().mT, solve(wide.mT @ wide + ridge.double(), wide.mT).mT)


def change_of_two_sides(x: Tensor, y: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The change whose outputs are weighed too: ``argmin sum_i ||D x_i - y_i||^2 + tr(S D A D^T)``.

    ``A`` and the rows' moment are diagonal in one basis ``B``, ``B^T A B = I`` and ``B^T X^T X B = diag(g)``, and ``S``
    in its own, so that each coordinate of ``D`` is one division by ``g_j + s_i``.

    Args:
        x: ``[n, d_in]``.
        y: ``[n, d_out]``.
        inputs: ``A [d_in, d_in]``, positive definite.
        outputs: ``S [d_out, d_out]``, positive semidefinite.

    Returns:
        ``D [d_out, d_in]``, float64.
    """
    wide, targets = x.double(), y.double()
    own, basis = torch.linalg.eigh(inputs.double())
    whitened = basis / own.clamp(min=float(own.max()) / _CONDITION).sqrt()
    rows = wide @ whitened
    g, inner = torch.linalg.eigh(rows.mT @ rows)
    s, left = torch.linalg.eigh(outputs.double())
    both = whitened @ inner
    small = float(g.max()) / _CONDITION
    down = (g.clamp(min=0)[None] + s.clamp(min=0)[:, None]).clamp(min=max(small, 1e-300))
    found: Tensor = left @ ((left.mT @ targets.mT @ wide @ both) / down) @ both.mT
    return found


class NormalEquations:
    """Rows added one batch after the other; the memory does not grow with their number.

    Args:
        ridge: ``R [d_in, d_in]``.
        d_out: the number of outputs.
    """

    def __init__(self, ridge: Tensor, d_out: int) -> None:
        self.system = ridge.double().clone()
        self.right = torch.zeros(len(ridge), d_out, dtype=torch.float64, device=ridge.device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows ``x [n, d_in]`` and ``y [n, d_out]``."""
        wide = x.double()
        self.system.addmm_(wide.mT, wide)
        self.right.addmm_(wide.mT, y.double())

    def change(self) -> Tensor:
        """``D [d_out, d_in]``, float64."""
        return solve(self.system, self.right).mT


@dataclass(eq=False)
class RecursiveLeastSquares:
    """The solution for the rows so far, updated in closed form when rows come or go (Woodbury).

    Attributes:
        inverse: ``P = (X^T X + R)^-1 [d_in, d_in]``, float64.
        change: ``D [d_out, d_in]``, float64.
    """

    inverse: Tensor
    change: Tensor

    @classmethod
    def start(cls, ridge: Tensor, d_out: int) -> Self:
        """The solution without rows, for a ridge ``R [d_in, d_in]``."""
        inverse = solve(ridge, torch.eye(len(ridge), dtype=torch.float64, device=ridge.device))
        return cls((inverse + inverse.mT) / 2, torch.zeros(d_out, len(ridge)).to(inverse))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows ``x [n, d_in]`` and ``y [n, d_out]`` in."""
        self._update(x.double(), y.double(), 1.0)

    def remove(self, x: Tensor, y: Tensor) -> None:
        """Take out rows that were added before."""
        self._update(x.double(), y.double(), -1.0)

    def _update(self, x: Tensor, y: Tensor, sign: float) -> None:
        toward = self.inverse @ x.mT  # [d_in, n]
        inner = sign * torch.eye(len(x), dtype=torch.float64, device=x.device) + x @ toward
        gain = torch.linalg.solve(inner, toward.mT)  # [n, d_in]
        self.change = self.change + (y - x @ self.change.mT).mT @ gain
        self.inverse = self.inverse - toward @ gain
        self.inverse = (self.inverse + self.inverse.mT) / 2
