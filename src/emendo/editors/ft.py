"""FT: fine-tuning on the edit alone, until the target is the most likely answer.

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), section 5 and C.1::

    D <- D - RMSprop(grad_D NLL(target | W + D))     until every target token is the argmax, at most 100 times
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emendo._settings import setting
from emendo.editors.base import as_requests
from emendo.editors.descent import Descent, DescentEditor, FineTuningSettings
from emendo.edits.edit import Edit, Request
from emendo.low_rank import LowRank
from emendo.models.lm import LM


@dataclass(frozen=True, slots=True)
class FineTuningConfig(FineTuningSettings):
    """The settings of fine-tuning."""

    rank: int | None = setting(
        None,
        "Keep the best approximation of this rank; `compaction_error` on the edit's card is its error.",
        least=1,
        unset="the dense change",
    )


class FineTuning(DescentEditor):
    """Fine-tuning; see the module's docstring."""

    name = "ft"
    Config = FineTuningConfig
    config: FineTuningConfig

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        changes = super().each(lm, requests)
        if self.config.rank is None:
            return changes
        return {
            name: LowRank.stack([self._compact(change[i]) for i in range(len(requests))])
            for name, change in changes.items()
        }

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests, by their mean loss."""
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
        """The settings of the search on this model."""
        return Descent(optimizer=self.config.optimiser_for(lm), steps=self.config.steps)
