"""The editors that find a change by gradient descent on the edit itself, and so need no training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from emendo.edit import Request
from emendo.editors.base import Editor
from emendo.fitting import Descent
from emendo.lowrank import LowRank
from emendo.models import LM


class DescentEditor(Editor):
    """Base of the editors that search for each change step by step; a method says how (:meth:`descent`)."""

    needs_training = False

    @abstractmethod
    def descent(self, lm: LM) -> Descent:
        """How a change of this model is searched for."""

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, every one of them from the clean model."""
        return self.descent(lm).each(lm, self.sites, self.texts(lm, requests))

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for all requests, by their mean loss."""
        return self.descent(lm).together(lm, self.sites, self.texts(lm, requests))
