"""From figures back to their rows: the records that did worst, one record's answers, and two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from emendo.errors import RequestError
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.intervals import Paired, paired
from emendo.evaluate.metrics import first_line
from emendo.evaluate.results import SCORES as HEADLINES
from emendo.evaluate.results import Outcome, Result
from emendo.evaluate.scores import BY_NAME, SCORES, values_of


def worst(evaluation: Evaluation, count: int, by: str | None = None) -> list[tuple[Result, float]]:
    """The records that did worst, worst first, each with what it is judged by.

    Args:
        evaluation: the run.
        count: how many.
        by: ``PROTOCOL.SCORE`` of :data:`emendo.evaluate.scores.SCORES`, or the name of a damage such as
            ``perplexity``; by default the mean of edit success, generalisation and locality, generated where that was
            measured, and among equals the probability of the target.

    Raises:
        RequestError: there is no such score, or no record has it.
    """
    kept: list[tuple[float, float, int]] = []
    for place, result in enumerate(evaluation.results):
        value, less_is_better = _judged(result, by)
        if value is not None:
            bad = math.inf if math.isnan(value) else (value if less_is_better else -value)
            kept.append((-bad, result.outcomes[0].after, place))
    if not kept:
        raise RequestError(f"No record of this run has the score {by!r}.")
    kept.sort()
    return [
        (evaluation.results[place], _shown(evaluation.results[place], by)) for _, _, place in kept[:count]
    ]


def _shown(result: Result, by: str | None) -> float:
    value = _judged(result, by)[0]
    assert value is not None
    return value


def _judged(result: Result, by: str | None) -> tuple[float | None, bool]:
    """A record's value, and whether less is better."""
    if by is None:
        free = any(outcome.generated is not None for outcome in result.outcomes)
        values = [result.score(name, "generated" if free else "teacher_forced") for name in HEADLINES]
        return fmean(value for value in values if value is not None), False
    if by in result.damage:
        return result.damage[by], by in ("perplexity", "repetition")
    group, _, name = by.partition(".")
    if (group, name) not in BY_NAME:
        known = ", ".join(f"{score.group}.{score.name}" for score in SCORES)
        raise RequestError(
            f"There is no score {by!r}; there are {known}, and of damage: {', '.join(result.damage)}."
        )
    return values_of([result], group, name)[0], BY_NAME[group, name].better < 0


def record_of(evaluation: Evaluation, name: str) -> Result:
    """The result of the record of that id, or else of that number from 1 up.

    Raises:
        RequestError: there is none.
    """
    for result in evaluation.results:
        if result.record.id == name:
            return result
    if name.isdecimal() and 1 <= int(name) <= len(evaluation.results):
        return evaluation.results[int(name) - 1]
    some = ", ".join(repr(r.record.id) for r in evaluation.results[:3] if r.record.id)
    raise RequestError(
        f"The run has no record {name!r}: give an id{f' such as {some}' if some else ''}, or a number from 1 to "
        f"{len(evaluation.results)}."
    )


def answer(outcome: Outcome, side: str) -> str | None:
    """What the model said, up to its line's end; None where it was not asked to speak.

    Args:
        outcome: of the prompt.
        side: ``"before"`` or ``"after"``.
    """
    text = getattr(outcome, f"text_{side}")
    return None if text is None else first_line(text)


def as_dict(result: Result) -> dict[str, Any]:
    """A record with every answer, as JSON values."""
    return {
        "record": asdict(result.record),
        **{name: getattr(result, name) for name in ("edit", "rank", "norm", "seconds")},
        "norms": dict(result.norms),
        "damage": dict(result.damage),
        "outcomes": [asdict(outcome) for outcome in result.outcomes],
    }


@dataclass(frozen=True, slots=True)
class Line:
    """One score of two runs.

    Attributes:
        group: its protocol.
        name: the score.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        found: the comparison.
    """

    group: str
    name: str
    better: int
    found: Paired


def side_by_side(first: Evaluation, second: Evaluation) -> list[Line]:
    """Every score that both runs have, over the records that both have.

    Args:
        first: a run.
        second: another one, of the same facts.

    Raises:
        RequestError: the runs have no record in common.
    """
    pairs = _common(first.results, second.results)
    if not pairs:
        raise RequestError("The two runs have no edit in common: their records differ in prompt or target.")
    lines = []
    one, two = [a for a, _ in pairs], [b for _, b in pairs]
    for score in SCORES:
        values = zip(
            values_of(one, score.group, score.name), values_of(two, score.group, score.name), strict=True
        )
        lines += _line(score.group, score.name, score.better, [(a, b) for a, b in values])
    for name in dict.fromkeys(name for result in one for name in result.damage):
        seen = [(a.damage.get(name), b.damage.get(name)) for a, b in pairs]
        lines += _line("damage", name, -1 if name in ("perplexity", "repetition") else 1, seen)
    return lines


def _line(
    group: str, name: str, better: int, values: Sequence[tuple[float | None, float | None]]
) -> list[Line]:
    both = [(a, b) for a, b in values if a is not None and b is not None]
    both = [(a, b) for a, b in both if math.isfinite(a) and math.isfinite(b)]
    found = paired([a for a, _ in both], [b for _, b in both])
    return [] if found is None else [Line(group, name, better, found)]


def _common(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    def key(result: Result) -> tuple[str | None, str, str]:
        return result.record.id, result.record.prompt, result.record.target

    other = {key(result): result for result in second}
    return [(result, other[key(result)]) for result in first if key(result) in other]
