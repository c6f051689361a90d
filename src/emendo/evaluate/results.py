"""What an evaluation found: one outcome for each prompt, and the scores over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, get_args

from emendo.data.schema import Record
from emendo.evaluate.metrics import Interval, mean_interval, unchanged

Kind = Literal["edit", "paraphrase", "neighbour", "unrelated"]
Measure = Literal["teacher_forced", "generated", "token_level"]

SCORES: Mapping[str, tuple[Kind, ...]] = {
    "edit_success": ("edit",),
    "generalisation": ("paraphrase",),
    "locality": ("neighbour", "unrelated"),
}
"""Score -> the kinds of prompts that it is taken over."""

_PARTS: Mapping[str, tuple[Kind, ...]] = {
    "locality_neighbours": ("neighbour",),
    "locality_unrelated": ("unrelated",),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one edit did to one prompt.

    Attributes:
        kind: the edit prompt itself, a paraphrase of it, a near neighbour or an unrelated prompt.
        prompt: the prompt.
        answer: the edit's target for the first two kinds, the stored answer for the others.
        teacher_forced: every answer token is predicted (first two kinds) or its prediction is unchanged (others).
        token_level: the fraction of answer tokens of which that is true.
        generated: the same by free greedy decoding; None where that was not asked for.
        known: the clean model predicts every answer token.
        before: probability of the answer in the clean model.
        after: probability of the answer in the edited model.
        kl: ``KL(clean || edited)`` in nats, averaged over the answer's positions.
        text_before: the clean model's greedy continuation; None where that was not asked for (paraphrases).
        text_after: the edited model's.
    """

    kind: Kind
    prompt: str
    answer: str
    teacher_forced: bool
    token_level: float
    generated: bool | None
    known: bool
    before: float
    after: float
    kl: float
    text_before: str | None = None
    text_after: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One record's edit and what it did.

    Attributes:
        record: the record.
        outcomes: one for each of its prompts, the edit prompt first.
        rank: rank of the edit, the highest among its sites; 0 where no weights change.
        norm: ``||dW|| / ||W||``, averaged over the sites; 0 where no weights change.
    """

    record: Record
    outcomes: tuple[Outcome, ...]
    rank: int
    norm: float

    def score(self, name: str, measure: Measure = "teacher_forced") -> float | None:
        """One of :data:`SCORES` for this record alone: the mean over its prompts, None where it has none."""
        kinds = SCORES.get(name) or _PARTS[name]
        values = [getattr(o, measure) for o in self.outcomes if o.kind in kinds]
        values = [float(value) for value in values if value is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Evaluation:
    """The whole of an evaluation.

    Attributes:
        results: one for each record, in the records' order.
        protocol: how it was measured, as JSON values.
        seconds_per_edit: median time of one edit made alone.
        seconds_per_edit_in_batch: time of the edits made in batches, divided by their number.
    """

    results: tuple[Result, ...]
    protocol: Mapping[str, Any]
    seconds_per_edit: float
    seconds_per_edit_in_batch: float

    def scores(self, measure: Measure = "teacher_forced") -> dict[str, Interval | None]:
        """Each score with its interval over the records; None where no record has such a prompt.

        Locality's two kinds also stand apart where there are both.
        """
        kinds = {outcome.kind for result in self.results for outcome in result.outcomes}
        apart = _PARTS if {"neighbour", "unrelated"} <= kinds else {}
        values = {
            name: [result.score(name, measure) for result in self.results] for name in (*SCORES, *apart)
        }
        return {name: mean_interval([v for v in row if v is not None]) for name, row in values.items()}

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
        return mean_interval([fmean(values) for values in kept if values]), sum(map(len, kept))

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
        return mean_interval([fmean(row) for row in rows if row])

    def locality_kl(self) -> float | None:
        """Mean ``KL(clean || edited)`` at the answer positions of the locality prompts, in nats."""
        values = [o.kl for r in self.results for o in r.outcomes if o.kind in SCORES["locality"]]
        return fmean(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """What ``emendo evaluate --json`` prints."""
        known, count = self.locality_known()
        prompts = [outcome.kind for result in self.results for outcome in result.outcomes]
        return {
            "records": len(self.results),
            "protocol": dict(self.protocol),
            "seconds_per_edit": self.seconds_per_edit,
            "seconds_per_edit_in_batch": self.seconds_per_edit_in_batch,
            "teacher_forced": _plain(self.scores("teacher_forced")),
            "generated": _plain(
                {**self.scores("generated"), "locality_whole_text": self.locality_whole_text()}
            )
            if self.has_generated
            else None,
            "token_level": _plain(self.scores("token_level")),
            "locality_known": {**_plain({"": known})[""], "n": count},
            "locality_kl": _finite(self.locality_kl()),
            "prompts": {kind: prompts.count(kind) for kind in get_args(Kind)},
            "rank": fmean(result.rank for result in self.results),
            "relative_norm": _finite(fmean(result.norm for result in self.results)),
        }


def _plain(scores: Mapping[str, Interval | None]) -> dict[str, dict[str, float | None]]:
    nothing: dict[str, float | None] = {"mean": None, "low": None, "high": None}
    return {name: {**nothing, **(score.as_dict() if score else {})} for name, score in scores.items()}


def _finite(value: float | None) -> float | None:
    """The value; None, which JSON can say, where a broken edit made it infinite or no number."""
    return value if value is not None and math.isfinite(value) else None
