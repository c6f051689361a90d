"""What a sequential evaluation found: the facts right after their edits, and all of them asked again now and then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from emendo.errors import RequestError
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.results import Result, finite, plain
from emendo.evaluate.scores import figures


@dataclass(frozen=True)
class Checkpoint:
    """What a model that has taken several edits answers.

    Attributes:
        edits: how many it has taken.
        results: one for each fact so far; their sizes are those of all edits together.
    """

    edits: int
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Sequential:
    """The whole of a sequential evaluation.

    Attributes:
        right_after: one result for each fact, asked right after its own edit (edit prompt and rewordings).
        checkpoints: in the order of their edits.
        protocol: how it was measured.
        clean: of the clean model, what the results' ``damage`` says.
        harness: what tasks of the evaluation harness gave after the last edit; empty where none was asked for.
    """

    right_after: tuple[Result, ...]
    checkpoints: tuple[Checkpoint, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    clean: Mapping[str, float] = field(default_factory=dict)
    harness: Mapping[str, Any] = field(default_factory=dict)

    def after(self, edits: int | None = None) -> Evaluation:
        """All facts as they were asked again after so many edits, by default after the last.

        Raises:
            RequestError: they were not asked then.
        """
        for point in self.checkpoints:
            if point.edits == (edits or len(self.right_after)):
                seconds = fmean(result.seconds for result in self.right_after)
                return Evaluation(point.results, self.protocol, seconds, seconds, self.clean)
        known = ", ".join(f"{point.edits:,}" for point in self.checkpoints)
        raise RequestError(f"All facts were asked again after {known} edits, not after {edits:,}.")

    def as_dict(self) -> dict[str, Any]:
        """What ``emendo evaluate --sequential --json`` prints."""
        points = []
        for point in self.checkpoints:
            so_far, last = self.right_after[: point.edits], point.results[-1]
            refused = [result.damage["refused"] for result in so_far if "refused" in result.damage]
            points.append(
                {
                    "edits": point.edits,
                    "refused": int(sum(refused)) if refused else None,
                    "right_after": {group: plain(scores) for group, scores in figures(so_far).items()},
                    "retained": {group: plain(scores) for group, scores in figures(point.results).items()},
                    "damage": {name: finite(value) for name, value in last.damage.items()},
                    "relative_norm": finite(last.norm),
                }
            )
        return {
            "records": len(self.right_after),
            "protocol": dict(self.protocol),
            "seconds_per_edit": fmean(result.seconds for result in self.right_after),
            "clean": {name: finite(value) for name, value in self.clean.items()},
            "checkpoints": points,
            "lm_eval": dict(self.harness) or None,
        }
