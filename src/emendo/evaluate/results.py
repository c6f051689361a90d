"""What an evaluation found: one outcome for each prompt, and the scores over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, get_args

from emendo.data.schema import Record
from emendo.evaluate.intervals import Interval, score_interval
from emendo.evaluate.metrics import unchanged

Kind = Literal[
    "edit", "paraphrase", "neighbour", "unrelated", "told", "reversed", "one_hop", "two_hop", "alias"
]
Measure = Literal["teacher_forced", "generated", "token_level"]

SCORES: Mapping[str, tuple[Kind, ...]] = {
    "edit_success": ("edit",),
    "generalisation": ("paraphrase",),
    "locality": ("neighbour", "unrelated"),
}
"""Score -> the kinds of prompts that it is taken over."""

LOCAL: tuple[Kind, ...] = ("neighbour", "unrelated", "told")
"""The kinds of prompts at which an edit shall change nothing."""

PORTABLE: tuple[Kind, ...] = ("reversed", "one_hop", "two_hop", "alias")
"""The kinds of prompts whose answer follows from the edit."""

_PARTS: Mapping[str, tuple[Kind, ...]] = {
    "locality_neighbours": ("neighbour",),
    "locality_unrelated": ("unrelated",),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one edit did to one prompt. Everything but the texts and their verdicts is teacher forced.

    Attributes:
        kind: the edit prompt itself, a paraphrase of it, a near neighbour, an unrelated prompt, one of these with the
            edited fact told before it, or a prompt whose answer follows from the edit.
        prompt: the prompt.
        answer: what is asked for: the edit's target, what follows from it, or the stored answer of the other kinds.
        teacher_forced: every answer token is predicted (edit, paraphrase, what follows) or its prediction is unchanged
            (others).
        token_level: the fraction of answer tokens of which that is true.
        generated: the same by free greedy decoding; None where that was not asked for.
        known: the clean model predicts every answer token.
        before: probability of the answer in the clean model, the product over its tokens.
        after: probability of the answer in the edited model.
        kl: ``KL(clean || edited)`` in nats, averaged over the answer's positions.
        text_before: the clean model's greedy continuation; None where that was not asked for (paraphrases).
        text_after: the edited model's.
        exact: the generated answer is the answer and nothing else (see :func:`emendo.evaluate.metrics.full_match`);
            None for prompts where nothing shall change.
        share_before: the fraction of the answer's tokens that the clean model predicts.
        share_after: the same in the edited model.
        rank_before: rank of the answer's worst token in the clean model, 1 for the argmax.
        rank_after: in the edited model.
        nll_before: NLL of the answer in the clean model, in nats per token.
        nll_after: in the edited model.
        other: the answer that it stands against: the old one at the edit and its paraphrases, the edit's target where
            nothing shall change; None where there is none.
        other_before: probability of ``other`` in the clean model; the next ones are as those of the answer.
        other_after: in the edited model.
        other_rank_before: as ``rank_before``.
        other_rank_after: as ``rank_after``.
        other_nll_before: as ``nll_before``.
        other_nll_after: as ``nll_after``.
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
    exact: bool | None = None
    share_before: float | None = None
    share_after: float | None = None
    rank_before: int | None = None
    rank_after: int | None = None
    nll_before: float | None = None
    nll_after: float | None = None
    other: str | None = None
    other_before: float | None = None
    other_after: float | None = None
    other_rank_before: int | None = None
    other_rank_after: int | None = None
    other_nll_before: float | None = None
    other_nll_after: float | None = None

    @property
    def local(self) -> bool:
        """Whether the edit shall change nothing here."""
        return self.kind in LOCAL


@dataclass(frozen=True, slots=True)
class Result:
    """One record's edit and what it did.

    Attributes:
        record: the record.
        outcomes: one for each of its prompts, the edit prompt first.
        rank: rank of the edit, the highest among its sites; 0 where no weights change.
        norm: ``||dW|| / ||W||``, averaged over the sites; 0 where no weights change.
        norms: the same of each site.
        seconds: time that making the edit took, as its share of the edits that were made with it.
        edit: the edit's number; the records of one edit of several facts share it.
        damage: what was seen away from the record's prompts, by name (see :mod:`emendo.evaluate.damage`).
    """

    record: Record
    outcomes: tuple[Outcome, ...]
    rank: int
    norm: float
    norms: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    edit: int = 0
    damage: Mapping[str, float] = field(default_factory=dict)

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
        apart = _PARTS if {"neighbour", "unrelated"} <= kinds else {}
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
        """By name: the clean model's value, and over the edits the mean with its interval and the extremes."""
        edits = {result.edit: result.damage for result in self.results}  # those of one edit have the same
        found = {}
        for name in dict.fromkeys(name for values in edits.values() for name in values):
            values = [edit[name] for edit in edits.values() if name in edit]
            mean = plain({name: score_interval(values, share=False)})[name]
            found[name] = {
                "clean": finite(self.clean.get(name)),
                **mean,
                "min": finite(min(values)),
                "max": finite(max(values)),
                "edits": len(values),
            }
        return found

    def as_dict(self) -> dict[str, Any]:
        """What ``emendo evaluate --json`` prints."""
        from emendo.evaluate.scores import figures

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


def per_record(results: Iterable[Result], value: Any, kinds: Sequence[Kind]) -> list[float | None]:
    """For each record the mean of ``value(outcome)`` over its prompts of some kinds, None where it has none.

    Args:
        results: of the records.
        value: an outcome to a number, or to None where it has no say.
        kinds: the prompts' kinds.
    """
    rows = ([value(o) for o in r.outcomes if o.kind in kinds] for r in results)
    kept = ([float(v) for v in row if v is not None] for row in rows)
    return [fmean(row) if row else None for row in kept]


def plain(scores: Mapping[str, Interval | None]) -> dict[str, dict[str, float | None]]:
    """Intervals as JSON values; null where there is none, or where a broken edit left no finite number."""
    nothing: dict[str, float | None] = {"mean": None, "low": None, "high": None}
    return {
        name: {**nothing, **({k: finite(v) for k, v in score.as_dict().items()} if score else {})}
        for name, score in scores.items()
    }


def finite(value: float | None) -> float | None:
    """The value; None, which JSON can say, where a broken edit made it infinite or no number."""
    return value if value is not None and math.isfinite(value) else None
