"""MEMIT: values for many facts, written by least squares over the MLPs of some blocks.

Meng, Sen Sharma, Andonian, Belinkov, Bau: "Mass-Editing Memory in a Transformer", ICLR 2023 (arXiv 2210.07229)::

    D_l = R_l^T K_l (covariance * C_l + K_l^T K_l)^-1        C_l = E[u u^T]        one row of K_l and R_l for each fact

with the residuals ``R_l`` shared out over the blocks (:mod:`emendo.editors._keys`). In a model that holds earlier
edits, their keys stand beside ``C`` (the form that AlphaEdit's paper gives; :meth:`continue_from`). Differences to the
paper: the values come from the search of ROME here, whose contexts replace the prefixes; ``C`` comes from text that the
model wrote itself, not from Wikipedia.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from emendo._settings import setting
from emendo.editors._keys import KeyEditor, KeySettings
from emendo.least_squares import change_of
from emendo.low_rank import LowRank
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class MemitConfig(KeySettings):
    """The settings of MEMIT."""

    covariance: float = setting(20.0, "Weight of running text: how many keys it counts as.", above=0)


class Memit(KeyEditor):
    """MEMIT; see the module's docstring."""

    name = "memit"
    Config = MemitConfig
    config: MemitConfig

    def solved(self, site: Site, keys: Tensor, residuals: Tensor, moment: Tensor) -> LowRank:
        """The change that writes ``residuals [n, d_out]`` at ``keys [n, d_in]``."""
        ridge = self.config.covariance * moment
        if site.name in self.earlier:
            ridge = ridge + self.earlier[site.name]
        return change_of(keys, residuals, ridge)
