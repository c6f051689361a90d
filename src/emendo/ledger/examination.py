"""What became of a whole stack of edits, and of everything else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from emendo.ledger.probing import Drift
from emendo.ledger.rows import Entry


@dataclass(frozen=True, slots=True)
class Holding:
    """Whether an edit still does what it was made for.

    Attributes:
        entry: the edit.
        reached: for each of its requests, whether its target is the most likely answer.
    """

    entry: Entry
    reached: tuple[bool, ...]

    @property
    def holds(self) -> bool:
        """Whether all of its targets are reached."""
        return all(self.reached)


@dataclass(frozen=True, slots=True)
class Examination:
    """The whole stack of edits, measured.

    Attributes:
        operation: the state that was measured.
        holdings: the active edits in their order.
        drift: of everything that is watched, from the clean model.
    """

    operation: int
    holdings: tuple[Holding, ...]
    drift: Drift

    @property
    def retention(self) -> float:
        """Share of the requests whose target is still the answer; 1 where there is none."""
        return fmean([float(right) for h in self.holdings for right in h.reached] or [1.0])

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "edits": len(self.holdings),
            "retention": self.retention,
            "lost": [h.entry.id for h in self.holdings if not h.holds],
            "drift": asdict(self.drift),
        }
