"""The results of edits: one outcome for each prompt, one result for each record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from emendo._storage import finite
from emendo.data.schema import Record
from emendo.evaluate.intervals import Interval

Kind = Literal[
    "edit", "paraphrase", "neighbour", "unrelated", "told", "reversed", "one_hop", "two_hop", "alias"
]
Measure = Literal["teacher_forced", "generated", "token_level"]

MAIN: Mapping[str, tuple[Kind, ...]] = {
    "edit_success": ("edit",),
    "generalisation": ("paraphrase",),
    "locality": ("neighbour", "unrelated"),
}
"""The three main scores, and the kinds of prompts that they are averaged over."""

LOCALITY_PARTS: Mapping[str, tuple[Kind, ...]] = {
    "locality_neighbours": ("neighbour",),
    "locality_unrelated": ("unrelated",),
}
"""Locality at each of its two kinds of prompts."""

LOCAL: tuple[Kind, ...] = ("neighbour", "unrelated", "told")
"""The kinds of prompts whose answers must not change."""

PORTABLE: tuple[Kind, ...] = ("reversed", "one_hop", "two_hop", "alias")
"""The kinds of prompts whose answers follow from the edit."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers to one prompt before and after an edit. All but the generated texts is teacher forced.

    Attributes:
        kind: the edit prompt itself, a paraphrase of it, a near neighbour, an unrelated prompt, a local prompt with the
            edited fact in its context ("told"), or a prompt whose answer follows from the edit.
        prompt: the prompt.
        answer: the expected answer: the edit's target, the answer that follows from it, or the stored answer of a local
            prompt.
        teacher_forced: whether every answer token is predicted, or at local prompts, its prediction is unchanged.
        token_level: the fraction of answer tokens for which that is true.
        generated: the same by greedy decoding; None where nothing was generated.
        known: whether the clean model predicts every answer token.
        before: probability of the answer in the clean model, the product over its tokens.
        after: probability of the answer in the edited model.
        kl: ``KL(clean || edited)`` in nats, averaged over the answer's positions.
        text_before: the clean model's greedy continuation; None where nothing was generated, and at paraphrases.
        text_after: the edited model's.
        exact: the generated answer is the answer and nothing else (see :func:`emendo.evaluate.metrics.full_match`);
            None at local prompts.
        share_before: the fraction of the answer's tokens that the clean model predicts.
        share_after: the same in the edited model.
        rank_before: rank of the answer's worst token in the clean model, 1 for the argmax.
        rank_after: in the edited model.
        nll_before: NLL of the answer in the clean model, in nats per token.
        nll_after: in the edited model.
        other: the competing answer: the old one at the edit and its paraphrases, the edit's target at local prompts;
            None where there is none.
        other_before: probability of ``other`` in the clean model.
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
        """Whether the edit must change nothing here."""
        return self.kind in LOCAL


@dataclass(frozen=True, slots=True)
class Result:
    """One record's edit and its outcomes.

    Attributes:
        record: the record.
        outcomes: one for each of its prompts, the edit prompt first.
        rank: rank of the edit, the highest among its sites; 0 where no weights change.
        norm: ``||dW|| / ||W||``, averaged over the sites; 0 where no weights change.
        norms: the same of each site.
        seconds: time to make the edit; edits made in one batch share their time evenly.
        edit: the edit's number; records that were edited together share it.
        damage: changes away from the record's prompts, by name (see :mod:`emendo.evaluate.damage`).
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
        """A main score, or a part of locality, of this record: the mean over its prompts, None where it has none."""
        kinds = MAIN.get(name) or LOCALITY_PARTS[name]
        values = [getattr(o, measure) for o in self.outcomes if o.kind in kinds]
        values = [float(value) for value in values if value is not None]
        return fmean(values) if values else None


def per_record(
    results: Iterable[Result], value: Callable[[Outcome], float | None], kinds: Sequence[Kind]
) -> list[float | None]:
    """For each record the mean of ``value(outcome)`` over its prompts of some kinds, None where it has none."""
    rows = ([value(o) for o in r.outcomes if o.kind in kinds] for r in results)
    kept = ([float(v) for v in row if v is not None] for row in rows)
    return [fmean(row) if row else None for row in kept]


def plain(scores: Mapping[str, Interval | None]) -> dict[str, dict[str, float | None]]:
    """Intervals as JSON values; null where there is none, or where it is not finite."""
    nothing: dict[str, float | None] = {"mean": None, "low": None, "high": None}
    return {
        name: {**nothing, **({k: finite(v) for k, v in score.as_dict().items()} if score else {})}
        for name, score in scores.items()
    }
