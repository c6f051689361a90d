"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emendo.editors.objective import Weights
from emendo.errors import RequestError


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How an editor is trained. The defaults were found by measurement (docs/log.md).

    Attributes:
        steps: optimiser steps.
        batch: facts per step.
        together: how many facts make one edit; the batch is a multiple of it (k in MEND, section 5.3).
        lr: learning rate of Adam at its peak; the editor may set multiples of it for some parameters.
        warmup: steps over which it rises; then it falls along a cosine to 2% at the end.
        minutes: stop after this much time, whatever ``steps`` says; the schedule follows whichever is nearer its end.
        c_edit: weight of the edit loss, over edit prompt and rewording, against the locality loss (c_e in MEND Eq. 4;
            0.1 in the paper, for the rewording alone).
        prompt_share: share of the edit loss that the edit prompt has; the rewording has the rest.
        variety: use at most so many rewordings, neighbours and unrelated probes of a record: each is a text more that
            the frozen blocks have to read once.
        near: locality examples per edit that the record itself gives (its neighbours).
        sibling: locality examples per edit taken from other records of the same relation.
        unrelated: locality examples per edit taken from the record's unrelated probes or any other record.
        text: locality examples per edit taken from running text, where the model is a decoder: from the passages that
            are given, else from what the model writes by itself.
        clip: largest norm of the whole gradient.
        seed: of the editor's start and of the order of the records.
        validate_every: steps between validations.
        validate_on: how many validation records to use.
        patience: stop after so many validations without a better score, the harmonic mean of edit success,
            generalisation and locality (while that is 0, without a lower loss).
        checkpoint_every: seconds between checkpoints.
    """

    steps: int = 2500
    batch: int = 8
    together: int = 1
    lr: float = 1e-3
    warmup: int = 100
    minutes: float | None = None
    c_edit: float = 0.3
    prompt_share: float = 0.5
    variety: int = 3
    near: int = 1
    sibling: int = 1
    unrelated: int = 0
    text: int = 1
    clip: float = 1.0
    seed: int = 0
    validate_every: int = 250
    validate_on: int = 100
    patience: int = 10
    checkpoint_every: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "together", "variety", "validate_every", "validate_on", "patience"):
            if getattr(self, name) < 1:
                raise RequestError(
                    f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}."
                )
        for name in ("lr", "c_edit", "clip"):
            if not getattr(self, name) > 0:
                raise RequestError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}.")
        if self.batch % self.together:
            raise RequestError(
                f"--batch must be a multiple of --together: {self.batch} facts cannot be put into edits of "
                f"{self.together}."
            )
        if self.minutes is not None and not self.minutes > 0:
            raise RequestError(f"--minutes must be above 0, not {self.minutes}.")
        for name in ("warmup", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise RequestError(
                    f"--{name.replace('_', '-')} cannot be negative, but is {getattr(self, name)}."
                )
        if not 0 <= self.prompt_share <= 1:
            raise RequestError(f"--prompt-share must be between 0 and 1, not {self.prompt_share}.")
        if min(self.near, self.sibling, self.unrelated, self.text) < 0:
            raise RequestError("The numbers of locality examples cannot be negative.")
        if self.near + self.sibling + self.unrelated + self.text == 0:
            raise RequestError(
                "At least one locality example per edit is needed, else nothing keeps the rest as it is."
            )

    @property
    def weights(self) -> Weights:
        """The weights of the losses."""
        return Weights(self.c_edit, self.prompt_share)

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is over after so many steps and seconds, by whichever limit is nearer."""
        share = step / self.steps
        return share if self.minutes is None else max(share, seconds / (self.minutes * 60))

    def rate(self, step: int, seconds: float) -> float:
        """Share of the peak learning rate: a linear rise, then a cosine down to 2%."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done(step, seconds)))))
