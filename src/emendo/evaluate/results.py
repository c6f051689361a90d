"""What an edit did: one outcome for each prompt, one result for each record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from emendo.data.schema import Record
from emendo.evaluate.intervals import Interval

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

LOCALITY_PARTS: Mapping[str, tuple[Kind, ...]] = {
    "locality_neighbours": ("neighbour",),
    "locality_unrelated": ("unrelated",),
}
"""Locality's two kinds apart."""


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
        kinds = SCORES.get(name) or LOCALITY_PARTS[name]
        values = [getattr(o, measure) for o in self.outcomes if o.kind in kinds]
        values = [float(value) for value in values if value is not None]
        return fmean(values) if values else None


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
