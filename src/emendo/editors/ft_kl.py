"""FT+KL: fine-tuning with a locality loss (an "oracle": it sees prompts whose answers must not change).

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), section 5 and C.1::

    loss = c_edit * NLL(target | W + D)  +  KL(p_W(. | x_loc) || p_(W + D)(. | x_loc))

with one fresh ``x_loc`` at each step, until every target token is the argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from emendo._settings import setting
from emendo.data import atlas
from emendo.data.schema import Probe
from emendo.editors.descent import Descent, DescentEditor, FineTuningSettings
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

_POOL = 200  # locality examples


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


class FineTuningKl(DescentEditor):
    """Fine-tuning with a locality loss; see the module's docstring.

    The locality examples are those of :meth:`set_locality`, or else the first built-in facts
    (:mod:`emendo.data.atlas`). All requests use them in the same order, so an edit does not depend on the rest of its
    batch.
    """

    name = "ft-kl"
    Config = FineTuningKlConfig
    config: FineTuningKlConfig

    def set_locality(self, probes: Sequence[Probe]) -> None:
        """Use the first 200 of these probes as locality examples; they are saved with the editor."""
        self.info["locality"] = [[probe.prompt, probe.answer] for probe in probes[:_POOL]]

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
        """The locality examples, one for each step.

        Raises:
            RequestError: a classifier has none, since the built-in facts have no classes.
        """
        pool = [(prompt, answer) for prompt, answer in self.info.get("locality", [])]
        if not pool and lm.kind == "classifier":
            raise RequestError(
                f"{self.name} needs prompts whose answers must not change, and for a classifier none are built in: "
                "give some with editor.set_locality([Probe(prompt, class), ...])."
            )
        pool = pool or list(self._built_in)
        Random(self.config.seed).shuffle(pool)
        return to_texts(lm, pool[: self.config.steps])

    @cached_property
    def _built_in(self) -> tuple[tuple[str, str], ...]:
        return tuple((record.prompt, str(record.answer)) for record in atlas.load("train", _POOL))
