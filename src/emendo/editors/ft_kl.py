"""FT+KL: fine-tuning that also keeps other answers as they are ("oracle": it sees what the others must not touch).

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), section 5 and C.1::

    loss = c_edit * NLL(target | W + D)  +  KL(p_W(. | x_loc) || p_(W + D)(. | x_loc))

with one fresh ``x_loc`` at each step, until every target token is the argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from emendo.data import atlas
from emendo.data.schema import Probe
from emendo.editors.descent import OPTIMIZERS, Descent, DescentEditor, check_settings, usual_rate
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

_POOL = 200  # locality examples to choose from


@dataclass(frozen=True, slots=True)
class FineTuningKlConfig:
    """The settings of fine-tuning with a locality loss.

    Attributes:
        steps: the most steps of an edit.
        lr: learning rate; None: :func:`emendo.editors.descent.usual_rate`.
        optimizer: ``"rmsprop"``, as in the paper, or ``"adam"``.
        c_edit: weight of the edit's loss against the locality loss; None: as in the paper, 1e-3 from 5e9 parameters on
            (GPT-J's size), else 1e-2.
        seed: of the order in which the locality examples are taken.
    """

    steps: int = 100
    lr: float | None = None
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    c_edit: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.steps, self.lr, self.optimizer)
        if self.c_edit is not None and not self.c_edit > 0:
            raise RequestError(f"c_edit must be above 0, not {self.c_edit}.")


class FineTuningKl(DescentEditor):
    """Fine-tuning with a locality loss; see the module's text.

    The locality examples are those of :meth:`observe`, or else the first built-in facts (:mod:`emendo.data.atlas`).
    All requests take them in the same order, so an edit does not depend on what else is in its batch.
    """

    name = "ft-kl"
    Config = FineTuningKlConfig
    config: FineTuningKlConfig

    def observe(self, probes: Sequence[Probe]) -> None:
        """Take the locality examples from these, the first 200 of them; they are saved with the editor."""
        self.info["locality"] = [[probe.prompt, probe.answer] for probe in probes[:_POOL]]

    def descent(self, lm: LM) -> Descent:
        """How a change of this model is searched for."""
        config = self.config
        usual = 1e-3 if lm.model.num_parameters() >= 5e9 else 1e-2
        return Descent(
            optimizer=OPTIMIZERS[config.optimizer](config.lr or usual_rate(lm)),
            steps=config.steps,
            c_edit=config.c_edit or usual,
            locality=self._locality(lm),
        )

    def _locality(self, lm: LM) -> list[Text]:
        """The locality examples in the order they are taken, one for each step.

        Raises:
            RequestError: there are none for a classifier, whose classes no built-in fact has.
        """
        pool = [(prompt, answer) for prompt, answer in self.info.get("locality", [])]
        if not pool and lm.kind == "classifier":
            raise RequestError(
                f"{self.name} needs prompts that shall keep their answers, and for a classifier none are built in: "
                "give it some with editor.observe([Probe(prompt, class), ...])."
            )
        pool = pool or list(self._built_in)
        Random(self.config.seed).shuffle(pool)
        return to_texts(lm, pool[: self.config.steps])

    @cached_property
    def _built_in(self) -> tuple[tuple[str, str], ...]:
        return tuple((record.prompt, str(record.answer)) for record in atlas.load("train", _POOL))
