"""Penalised fine-tuning: the size of the change is part of the loss.

The penalised form of Zhu, Rawat, Zaheer, Bhojanapalli, Li, Yu, Kumar: "Modifying Memories in Transformer Models", 2020
(arXiv 2012.00363), which :mod:`emendo.editors.ft_constrained` has in its constrained form::

    minimise over D    NLL(targets | W + D)  +  c * sum over matrices of  ||D||^2 / 2    (l2)
                                                                      or  max |D|        (linf)

Each step of Adam is followed by the proximal operator of the penalty in Adam's metric ``h``. For l2 it is a division.
For linf it cuts the entries off at a height ``t``: by Moreau's identity, the change less its projection onto the ball
of the dual norm, ``sum |x| <= c`` where ``h = 1``. The L0 penalty is :mod:`emendo.editors.diff_pruning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from emendo._settings import setting
from emendo.editors._penalties import PenalisedSettings, proximal_l2, proximal_linf
from emendo.editors.descent import Adam, Descent, DescentEditor
from emendo.models.lm import LM

_COEFFICIENTS = {"l2": 3.0, "linf": 300.0}


@dataclass(frozen=True, slots=True)
class PenalisedConfig(PenalisedSettings):
    """The settings of penalised fine-tuning."""

    norm: Literal["l2", "linf"] = setting(
        "l2", "Penalty of each matrix's change: half its squared Frobenius norm, or its largest entry."
    )
    coefficient: float | None = setting(
        None, "Weight of the penalty against the NLL in nats.", above=0, unset="3, 300"
    )


class PenalisedFineTuning(DescentEditor):
    """Penalised fine-tuning; see the module's docstring."""

    name = "ft-penalised"
    Config = PenalisedConfig
    config: PenalisedConfig

    def descent(self, lm: LM) -> Descent:
        """The settings of the search on this model."""
        coefficient = self.config.coefficient or _COEFFICIENTS[self.config.norm]
        if self.config.norm == "l2":
            proximal = partial(proximal_l2, weight=coefficient)
        else:
            proximal = partial(proximal_linf, weight=coefficient)
        return Descent(
            optimizer=Adam(self.config.lr),
            steps=self.config.steps,
            proximal={site.name: proximal for site in self.sites},
            until=self.config.until,
        )
