"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emendo._settings import Settings, setting
from emendo.errors import RequestError

if TYPE_CHECKING:
    from emendo.editors.objective import Weights


@dataclass(frozen=True, slots=True)
class TrainConfig(Settings):
    """The settings of a training run; the options of ``emendo train`` are made from these fields.

    The defaults were found by measurement (docs/log.md).
    """

    names_are_options: ClassVar[bool] = True

    steps: int = setting(2500, "Optimiser steps.", least=1)
    batch: int = setting(8, "Facts per step.", least=1)
    together: int = setting(1, "Facts in one edit; --batch is a multiple of it.", least=1)
    lr: float = setting(
        1e-3, "Peak learning rate of Adam; the method may scale it for some parameters.", above=0
    )
    warmup: int = setting(
        100, "Steps of the linear rise of the learning rate; a cosine down to 2% follows.", least=0
    )
    minutes: float | None = setting(
        None, "Stop after this time, whatever --steps says; the schedule follows.", above=0, unset="no limit"
    )
    c_edit: float = setting(
        0.3, "Weight of the edit loss, over edit prompt and paraphrase, against the locality loss.", above=0
    )
    prompt_share: float = setting(
        0.5, "Share of the edit prompt in the edit loss; the paraphrase has the rest.", least=0, most=1
    )
    variety: int = setting(
        3,
        "Largest number of paraphrases, neighbours and unrelated probes of a record that are used.",
        least=1,
    )
    near: int = setting(1, "Locality examples per edit from the record's neighbours.", least=0)
    sibling: int = setting(1, "Locality examples per edit from other records of the same relation.", least=0)
    unrelated: int = setting(
        0, "Locality examples per edit from the record's unrelated probes, or from any other record.", least=0
    )
    text: int = setting(
        1,
        "Passages of running text per edit that must not change; for decoders only.",
        least=0,
        flag="--text-examples",
    )
    clip: float = setting(1.0, "Largest norm of the gradient.", above=0)
    seed: int = setting(0, "Seed of the editor's initial state and of the order of the facts.")
    validate_every: int = setting(250, "Steps between validations; the best editor is kept.", least=1)
    validate_on: int = setting(100, "Largest number of facts of a validation.", least=1)
    patience: int = setting(
        10,
        "Stop after this many validations without a better score, the harmonic mean of edit success, generalisation "
        "and locality.",
        least=1,
    )
    checkpoint_every: float = setting(60.0, "Seconds between checkpoints.", least=0)

    def _check(self) -> None:
        if self.batch % self.together:
            raise RequestError(
                f"--batch must be a multiple of --together: {self.batch} facts cannot be divided into edits of "
                f"{self.together}."
            )
        if not self.near + self.sibling + self.unrelated + self.text:
            raise RequestError(
                "At least one locality example per edit is needed: set --near, --sibling, --unrelated or "
                "--text-examples above 0."
            )

    @property
    def weights(self) -> Weights:
        """The weights of the losses."""
        from emendo.editors.objective import Weights  # imports torch, which help pages do not need

        return Weights(self.c_edit, self.prompt_share)

    def done(self, step: int, seconds: float) -> float:
        """Finished share of the run after a number of steps and seconds: the larger of the two shares."""
        share = step / self.steps
        return share if self.minutes is None else max(share, seconds / (self.minutes * 60))

    def rate(self, step: int, seconds: float) -> float:
        """Share of the peak learning rate: a linear rise, then a cosine down to 2%."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done(step, seconds)))))
