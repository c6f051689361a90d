"""Evaluations: the results of all records, and the scores over them; of separate edits and of sequences of edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, get_args

from emendo._storage import finite
from emendo.errors import RequestError
from emendo.evaluate.intervals import Interval, mean_interval
from emendo.evaluate.metrics import unchanged
from emendo.evaluate.results import LOCALITY_PARTS, MAIN, Kind, Measure, Result, plain
from emendo.evaluate.scores import scores_as_dict

_ALWAYS: tuple[Kind, ...] = ("edit", "paraphrase", "neighbour", "unrelated")
"""Kinds of prompts that are counted even where there are none."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of edits that were each made from the clean model.

    Attributes:
        results: one for each record, in the order of the records.
        protocol: how it was measured, as JSON values.
        seconds_per_edit: median time of one edit made alone.
        seconds_per_edit_in_batch: time of the edits made in batches, divided by their number.
        clean: the clean model's values of the results' ``damage``.
        cost: the editor's size and the peak memory.
        harness: scores of the evaluation harness (see :mod:`emendo.evaluate.harness`); empty where it was not run.
        routing: where all edits were in one memory (:mod:`emendo.evaluate.routed`), the shares of the prompts in scope
            that were answered under the right edit, a wrong one, or none, the same of the neighbours that another edit
            is about, by kind of prompt the share of those out of scope that fired an edit, and the locality of the
            prompts that no edit is about; else empty.
    """

    results: tuple[Result, ...]
    protocol: Mapping[str, Any]
    seconds_per_edit: float
    seconds_per_edit_in_batch: float
    clean: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    harness: Mapping[str, Any] = field(default_factory=dict)
    routing: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, measure: Measure = "teacher_forced") -> dict[str, Interval | None]:
        """The main scores with their intervals; None where no record has such a prompt.

        The two parts of locality are included where there are prompts of both kinds.
        """
        kinds = {outcome.kind for result in self.results for outcome in result.outcomes}
        parts = LOCALITY_PARTS if {"neighbour", "unrelated"} <= kinds else {}
        values = {name: [result.score(name, measure) for result in self.results] for name in (*MAIN, *parts)}
        return {name: mean_interval([v for v in row if v is not None]) for name, row in values.items()}

    @property
    def has_generated(self) -> bool:
        """Whether free generation was measured."""
        return any(outcome.generated is not None for result in self.results for outcome in result.outcomes)

    def locality_known(self) -> tuple[Interval | None, int]:
        """Teacher-forced locality over the prompts that the clean model answers correctly, and their number."""
        kept = [
            [float(o.teacher_forced) for o in result.outcomes if o.kind in MAIN["locality"] and o.known]
            for result in self.results
        ]
        return mean_interval([fmean(values) for values in kept if values]), sum(map(len, kept))

    def locality_whole_text(self) -> Interval | None:
        """The share of locality prompts whose generated text is unchanged up to its first line break."""
        rows = [
            [
                float(unchanged(o.text_before, o.text_after))
                for o in result.outcomes
                if o.kind in MAIN["locality"] and o.text_before is not None and o.text_after is not None
            ]
            for result in self.results
        ]
        return mean_interval([fmean(row) for row in rows if row])

    def locality_kl(self) -> float | None:
        """Mean ``KL(clean || edited)`` at the answer positions of the locality prompts, in nats."""
        values = [o.kl for r in self.results for o in r.outcomes if o.kind in MAIN["locality"]]
        return fmean(values) if values else None

    def site_norms(self) -> dict[str, float]:
        """``||dW|| / ||W||`` of each site, averaged over the edits."""
        names = list(dict.fromkeys(name for result in self.results for name in result.norms))
        return {name: fmean(r.norms[name] for r in self.results if name in r.norms) for name in names}

    def damage(self) -> dict[str, dict[str, float | None]]:
        """By name: the clean model's value, and the mean with its interval, median and extremes over the edits."""
        edits = {result.edit: result.damage for result in self.results}  # the records of one edit share it
        found = {}
        for name in dict.fromkeys(name for values in edits.values() for name in values):
            values = [edit[name] for edit in edits.values() if name in edit]
            mean = plain({name: mean_interval(values, share=False)})[name]
            found[name] = {
                "clean": finite(self.clean.get(name)),
                **mean,
                "median": finite(median(values)),
                "min": finite(min(values)),
                "max": finite(max(values)),
                "edits": len(values),
            }
        return found

    def as_dict(self) -> dict[str, Any]:
        """The JSON output of ``emendo evaluate``."""
        known, count = self.locality_known()
        prompts = [outcome.kind for result in self.results for outcome in result.outcomes]
        return {
            "records": len(self.results),
            "protocol": dict(self.protocol),
            "seconds_per_edit": self.seconds_per_edit,
            "seconds_per_edit_in_batch": self.seconds_per_edit_in_batch,
            "teacher_forced": plain(self.scores("teacher_forced")),
            "generated": plain(
                {**self.scores("generated"), "locality_whole_text": self.locality_whole_text()}
            )
            if self.has_generated
            else None,
            "token_level": plain(self.scores("token_level")),
            "locality_known": {**plain({"": known})[""], "n": count},
            "locality_kl": finite(self.locality_kl()),
            "scores": scores_as_dict(self.results),
            "prompts": {
                kind: prompts.count(kind) for kind in get_args(Kind) if kind in prompts or kind in _ALWAYS
            },
            "rank": fmean(result.rank for result in self.results),
            "relative_norm": finite(fmean(result.norm for result in self.results)),
            "site_norms": {name: finite(value) for name, value in self.site_norms().items()},
            "damage": self.damage(),
            "lm_eval": dict(self.harness) or None,
            "cost": dict(self.cost),
            **({"routing": dict(self.routing)} if self.routing else {}),
        }


@dataclass(frozen=True)
class Checkpoint:
    """All facts so far, asked again after several edits.

    Attributes:
        edits: the number of edits.
        results: one for each fact so far; their norms are those of all edits together.
    """

    edits: int
    results: tuple[Result, ...]


@dataclass(frozen=True)
class SequentialEvaluation:
    """An evaluation of edits that were each made in the model with all earlier ones.

    Attributes:
        right_after: one result for each fact, asked right after its own edit (edit prompt and paraphrases).
        checkpoints: in ascending order of their edits.
        protocol: how it was measured.
        clean: the clean model's values of the results' ``damage``.
        harness: scores of the evaluation harness after the last edit; empty where it was not run.
    """

    right_after: tuple[Result, ...]
    checkpoints: tuple[Checkpoint, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    clean: Mapping[str, float] = field(default_factory=dict)
    harness: Mapping[str, Any] = field(default_factory=dict)

    def after(self, edits: int | None = None) -> Evaluation:
        """The answers after that many edits, by default after the last, as an evaluation.

        Raises:
            RequestError: there is no such checkpoint.
        """
        for point in self.checkpoints:
            if point.edits == (edits or len(self.right_after)):
                seconds = fmean(result.seconds for result in self.right_after)
                return Evaluation(point.results, self.protocol, seconds, seconds, self.clean)
        known = ", ".join(f"{point.edits:,}" for point in self.checkpoints)
        raise RequestError(f"There are checkpoints after {known} edits, not after {edits:,}.")

    def as_dict(self) -> dict[str, Any]:
        """The JSON output of ``emendo evaluate --sequential``."""
        points = []
        for point in self.checkpoints:
            so_far, last = self.right_after[: point.edits], point.results[-1]
            refused = [result.damage["refused"] for result in so_far if "refused" in result.damage]
            points.append(
                {
                    "edits": point.edits,
                    "refused": int(sum(refused)) if refused else None,
                    "right_after": scores_as_dict(so_far),
                    "retained": scores_as_dict(point.results),
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
