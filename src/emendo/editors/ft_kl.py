"""FT+KL: fine-tuning with a locality loss (an "oracle": it sees prompts whose answers must not change).

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), section 5 and C.1::

    loss = c_edit * NLL(target | W + D)  +  KL(p_W(. | x_loc) || p_(W + D)(. | x_loc))

with one fresh ``x_loc`` at each step, until every target token is the argmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from emendo._settings import setting
from emendo.editors._locality import LocalityEditor
from emendo.editors.descent import Descent, DescentEditor, FineTuningSettings
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import to_texts


@dataclass(frozen=True, slots=True)
class FineTuningKlConfig(FineTuningSettings):
    """The settings of fine-tuning with a locality loss."""

    c_edit: float | None = setting(
        None,
        "Weight of the edit loss against the locality loss.",
        above=0,
        unset="as in the paper: 1e-3 from 5e9 parameters on, else 1e-2",
    )
    seed: int = setting(0, "Seed of the order of the locality examples.")


class FineTuningKl(LocalityEditor, DescentEditor):
    """Fine-tuning with a locality loss; see the module's docstring.

    All requests use the locality examples in the same order, so an edit does not depend on the rest of its
    batch.
    """

    name = "ft-kl"
    Config = FineTuningKlConfig
    config: FineTuningKlConfig

    def descent(self, lm: LM) -> Descent:
        """The settings of the search on this model."""
        config = self.config
        usual = 1e-3 if lm.model.num_parameters() >= 5e9 else 1e-2
        return Descent(
            optimizer=config.optimiser_for(lm),
            steps=config.steps,
            c_edit=config.c_edit or usual,
            locality=self._locality(lm),
        )

    def _locality(self, lm: LM) -> list[Text]:
        """The locality examples, one for each step."""
        pool = self.locality(lm)
        Random(self.config.seed).shuffle(pool)
        return to_texts(lm, pool[: self.config.steps])
