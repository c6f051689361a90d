"""From scores back to their rows: the worst records, the answers of one record, and two runs side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from emendo.errors import RequestError
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.intervals import Paired, paired
from emendo.evaluate.metrics import first_line
from emendo.evaluate.results import MAIN, Outcome, Result
from emendo.evaluate.scores import ALIASES, BY_NAME, SCORES, values_of

_LOG = logging.getLogger("emendo")


def worst(evaluation: Evaluation, count: int, by: str | None = None) -> list[tuple[Result, float]]:
    """The records with the worst scores, worst first, each with the score.

    Args:
        evaluation: the run.
        count: the number of records.
        by: ``PROTOCOL.SCORE`` of :data:`emendo.evaluate.scores.SCORES`, or the name of a damage such as
            ``perplexity``; by default the mean of edit success, generalisation and locality (generated, where that was
            measured). Among equals, the records with the least probable target come first.

    Raises:
        RequestError: there is no such score, or no record has it.
    """
    kept: list[tuple[float, float, int, float]] = []
    for place, result in enumerate(evaluation.results):
        value, less_is_better = _ranked_by(result, by)
        if value is not None:
            bad = math.inf if math.isnan(value) else (value if less_is_better else -value)
            kept.append((-bad, result.outcomes[0].after, place, value))
    if not kept:
        raise RequestError(f"No record of this run has the score {by!r}.")
    kept.sort()
    return [(evaluation.results[place], value) for _, _, place, value in kept[:count]]


def _ranked_by(result: Result, by: str | None) -> tuple[float | None, bool]:
    """The value that a record is ranked by, and whether less is better."""
    if by is None:
        free = any(outcome.generated is not None for outcome in result.outcomes)
        values = [result.score(name, "generated" if free else "teacher_forced") for name in MAIN]
        return fmean(value for value in values if value is not None), False
    if by in result.damage:
        return result.damage[by], by in ("perplexity", "repetition")
    group, _, name = by.partition(".")
    if (group, name) in ALIASES:
        present = ALIASES[group, name]
        _LOG.warning("%s is deprecated; the score is now %s.%s", by, group, present)
        name = present
    if (group, name) not in BY_NAME:
        known = ", ".join(f"{score.group}.{score.name}" for score in SCORES)
        raise RequestError(
            f"There is no score {by!r}; the scores are {known}, and of damage: {', '.join(result.damage)}."
        )
    return values_of([result], group, name)[0], BY_NAME[group, name].better < 0


def record_of(evaluation: Evaluation, name: str) -> Result:
    """The result of the record with this id, or else with this number, from 1 up.

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
    """The first line of the generated text; None where nothing was generated.

    Args:
        outcome: of the prompt.
        side: ``"before"`` or ``"after"``.
    """
    text = getattr(outcome, f"text_{side}")
    return None if text is None else first_line(text)


def as_dict(result: Result) -> dict[str, Any]:
    """A record with every answer, as JSON values."""
    return {
        "record": result.record.as_dict(),
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
