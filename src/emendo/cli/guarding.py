"""The ledger's guard before the edits of a sequence that is being measured."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from emendo.edit import Request
from emendo.editors import Editor
from emendo.errors import RequestError
from emendo.ledger.guard import Health, Limits, reached
from emendo.ledger.probing import Watch, Watched
from emendo.lowrank import LowRank, applied
from emendo.models import LM


class Guarding:
    """Says of each edit whether the guard lets it stay, as :data:`emendo.evaluate.sequence.Gate` asks.

    Args:
        lm: the clean model.
        editor: what makes the edits.
        limits: what the guard lets pass.

    Raises:
        RequestError: the editor trains the model itself, so that there is no clean model to watch.
    """

    def __init__(self, lm: LM, editor: Editor, limits: Limits | None = None) -> None:
        if editor.host(lm) is not lm:
            raise RequestError(
                f"{editor.name} trains the model itself; --guard watches the clean one: leave it out."
            )
        self.lm, self.limits = lm, limits or Limits()
        self.size = {site.name: float(site.weight(lm.model).double().norm()) for site in editor.sites}
        self.watch = Watch(lm, Watched())
        self.clean = self.now = self.watch.read()
        self.prompts: list[str] = []

    def __call__(self, request: Request, change: Mapping[str, LowRank]) -> bool:
        """Look at the model with the change and without it, the earlier edits being attached."""
        with applied(self.lm.model, change):
            after = self.watch.read()
            hit = reached(self.lm, [(request.prompt, request.target)])
        besides = [*self.prompts, request.prompt]
        health = Health.of(
            reached=fmean(map(float, hit)),
            reworded=None,
            norm=max(float(delta.norm()) / self.size[name] for name, delta in change.items()),
            own=after.drift(self.now, besides),
            total=after.drift(self.clean, besides),
        )
        stays = not health.problems(self.limits)
        if stays:
            self.now, self.prompts = after, besides
        return stays
