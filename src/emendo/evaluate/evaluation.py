"""The whole of an evaluation: the results of all records, and the scores over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, get_args

from emendo.evaluate.intervals import Interval, score_interval
from emendo.evaluate.metrics import unchanged
from emendo.evaluate.results import LOCALITY_PARTS, SCORES, Kind, Measure, Result, finite, plain
from emendo.evaluate.scores import figures


@dataclass(frozen=True)
class Evaluation:
    """The whole of an evaluation.

    Attributes:
        results: one for each record, in the records' order.
        protocol: how it was measured, as JSON values.
        seconds_per_edit: median time of one edit made alone.
        seconds_per_edit_in_batch: time of the edits made in batches, divided by their number.
        clean: of the clean model, what each result's ``damage`` says of an edited one.
        cost: the editor's size and the most memory in use.
        harness: what tasks of the evaluation harness gave (see :mod:`emendo.evaluate.harness`); empty where none was
            asked for.
    """

    results: tuple[Result, ...]
    protocol: Mapping[str, Any]
    seconds_per_edit: float
    seconds_per_edit_in_batch: float
    clean: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    harness: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, measure: Measure = "teacher_forced") -> dict[str, Interval | None]:
        """Each score with its interval over the records; None where no record has such a prompt.

        Locality's two kinds also stand apart where there are both.
        """
        kinds = {outcome.kind for result in self.results for outcome in result.outcomes}
        apart = LOCALITY_PARTS if {"neighbour", "unrelated"} <= kinds else {}
        values = {
            name: [result.score(name, measure) for result in self.results] for name in (*SCORES, *apart)
        }
        return {name: score_interval([v for v in row if v is not None]) for name, row in values.items()}

    @property
    def has_generated(self) -> bool:
        """Whether free generation was measured too."""
        return any(outcome.generated is not None for result in self.results for outcome in result.outcomes)

    def locality_known(self) -> tuple[Interval | None, int]:
        """Teacher-forced locality over the prompts that the clean model answers right, and their number."""
        kept = [
            [float(o.teacher_forced) for o in result.outcomes if o.kind in SCORES["locality"] and o.known]
            for result in self.results
        ]
        return score_interval([fmean(values) for values in kept if values]), sum(map(len, kept))

    def locality_whole_text(self) -> Interval | None:
        """How many locality prompts keep their whole generated text, letter by letter up to its first line break."""
        rows = [
            [
                float(unchanged(o.text_before, o.text_after))
                for o in result.outcomes
                if o.kind in SCORES["locality"] and o.text_before is not None and o.text_after is not None
            ]
            for result in self.results
        ]
        return score_interval([fmean(row) for row in rows if row])

    def locality_kl(self) -> float | None:
        """Mean ``KL(clean || edited)`` at the answer positions of the locality prompts, in nats."""
        values = [o.kl for r in self.results for o in r.outcomes if o.kind in SCORES["locality"]]
        return fmean(values) if values else None

    def site_norms(self) -> dict[str, float]:
        """``||dW|| / ||W||`` of each site, averaged over the edits."""
        names = list(dict.fromkeys(name for result in self.results for name in result.norms))
        return {name: fmean(r.norms[name] for r in self.results if name in r.norms) for name in names}

    def damage(self) -> dict[str, dict[str, float | None]]:
        """By name: the clean model's value; of the edits the mean with its interval, median and extremes."""
        edits = {result.edit: result.damage for result in self.results}  # those of one edit have the same
        found = {}
        for name in dict.fromkeys(name for values in edits.values() for name in values):
            values = [edit[name] for edit in edits.values() if name in edit]
            mean = plain({name: score_interval(values, share=False)})[name]
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
        """What ``emendo evaluate --json`` prints."""
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
            "scores": {group: plain(scores) for group, scores in figures(self.results).items()},
            "prompts": {
                kind: prompts.count(kind) for kind in get_args(Kind) if kind in prompts or kind in _ALWAYS
            },
            "rank": fmean(result.rank for result in self.results),
            "relative_norm": finite(fmean(result.norm for result in self.results)),
            "site_norms": {name: finite(value) for name, value in self.site_norms().items()},
            "damage": self.damage(),
            "lm_eval": dict(self.harness) or None,
            "cost": dict(self.cost),
        }


_ALWAYS: tuple[Kind, ...] = ("edit", "paraphrase", "neighbour", "unrelated")
"""Kinds whose number of prompts is told even where it is 0."""
