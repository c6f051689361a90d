"""AlphaEdit: values for many facts, written where running text has next to no inputs.

Fang, Jiang, Wang, Ma, Shi, Wang, He, Chua: "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
ICLR 2025 (arXiv 2410.02355), Eq. 14, ``P`` the projection onto the eigenvectors of ``E[u u^T]`` of low eigenvalue::

    D = R^T K P (K_p^T K_p P + K^T K P + ridge * I)^-1        so  D P = D,  and D answers running text next to nothing

``K_p`` are the keys of the edits before (:meth:`continue_from`). The values and their share for each block are those
of MEMIT (:mod:`emendo.editors._keys`). Differences to the paper: the threshold of the eigenvalues is a share of their
mean, not a constant that depends on the model; ``E[u u^T]`` comes from text that the model wrote itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emendo._settings import setting
from emendo.editors._keys import KeyEditor, KeySettings
from emendo.least_squares import change_of
from emendo.low_rank import LowRank
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class AlphaEditConfig(KeySettings):
    """The settings of AlphaEdit."""

    threshold: float = setting(
        0.3,
        "Largest eigenvalue of the directions that are written in, as a multiple of the mean eigenvalue.",
        above=0,
    )
    identity: float = setting(0.1, "Ridge of the change, as a multiple of the mean square of a key.", above=0)


class AlphaEdit(KeyEditor):
    """AlphaEdit; see the module's docstring."""

    name = "alphaedit"
    Config = AlphaEditConfig
    config: AlphaEditConfig

    def solved(self, site: Site, keys: Tensor, residuals: Tensor, moment: Tensor) -> LowRank:
        """The change that writes ``residuals [n, d_out]`` at ``keys [n, d_in]``, within the null space."""
        basis = null_space(moment, self.config.threshold)
        inner = keys @ basis
        ridge = self.config.identity * float(keys.square().mean()) * torch.eye(basis.shape[1]).to(inner)
        if site.name in self.earlier:
            ridge = ridge + basis.mT @ self.earlier[site.name] @ basis
        change = change_of(inner, residuals, ridge)
        return LowRank(change.left, change.right @ basis.mT)


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """The eigenvectors ``[d, m]`` of a moment ``[d, d]`` with eigenvalues below ``threshold`` times their mean."""
    values, vectors = torch.linalg.eigh(moment.double())
    found: Tensor = vectors[:, values < threshold * values.mean()]
    return found
