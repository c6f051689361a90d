"""FT: fine-tuning on the edit alone, until the model says it.

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), section 5 and C.1::

    D <- D - RMSprop(grad_D NLL(target | W + D))     until every target token is the argmax, at most 100 times
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emendo.editors.base import as_requests
from emendo.editors.descent import OPTIMIZERS, Descent, DescentEditor, check_settings, usual_rate
from emendo.edits.edit import Edit, Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank
from emendo.models.lm import LM


@dataclass(frozen=True, slots=True)
class FineTuningConfig:
    """The settings of fine-tuning.

    Attributes:
        steps: the most steps of an edit.
        lr: learning rate; None: :func:`emendo.editors.descent.usual_rate`.
        optimizer: ``"rmsprop"``, as in the paper, or ``"adam"``.
        rank: None keeps the change as it is, a dense matrix for each site; a number keeps the best approximation of
            that rank, and ``Edit.card["compaction_error"]`` says what that lost.
    """

    steps: int = 100
    lr: float | None = None
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    rank: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.steps, self.lr, self.optimizer)
        if self.rank is not None and self.rank < 1:
            raise RequestError(
                f"rank must be at least 1, not {self.rank}; leave it out to keep the whole change."
            )


class FineTuning(DescentEditor):
    """Fine-tuning; see the module's text."""

    name = "ft"
    Config = FineTuningConfig
    config: FineTuningConfig

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, every one of them from the clean model."""
        changes = super().each(lm, requests)
        if self.config.rank is None:
            return changes
        return {
            name: LowRank.stack([self._compact(change[i]) for i in range(len(requests))])
            for name, change in changes.items()
        }

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for all requests, by their mean loss."""
        changes = self._whole(lm, requests)
        return {name: self._compact(change) for name, change in changes.items()}

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> Edit:
        """Make one edit of one fact or of several; see :meth:`emendo.editors.base.Editor.edit`.

        With a ``rank`` its card has the ``compaction_error``, ``||D - D_rank|| / ||D||`` over all sites.
        """
        requests = as_requests(prompt, target)
        whole = self._whole(lm, requests)
        kept = {name: self._compact(change) for name, change in whole.items()}
        card = {}
        if self.config.rank is not None:
            lost = math.hypot(*(float((whole[name] + kept[name].scale(-1)).norm()) for name in whole))
            card["compaction_error"] = lost / math.hypot(*(float(change.norm()) for change in whole.values()))
        return Edit(kept, self.origin(lm, requests), card)

    def _whole(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        return super().together(lm, requests)

    def _compact(self, change: LowRank) -> LowRank:
        return change if self.config.rank is None else change.compact(self.config.rank)

    def descent(self, lm: LM) -> Descent:
        """How a change of this model is searched for."""
        optimizer = OPTIMIZERS[self.config.optimizer](self.config.lr or usual_rate(lm))
        return Descent(optimizer=optimizer, steps=self.config.steps)
