"""The figures of an evaluation: every score of :mod:`emendo.evaluate.score_list` with its interval.

A score is the mean over the records of the mean over a record's prompts, so that a record with many prompts counts no
more than others; its interval is a bootstrap over the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from emendo.evaluate.intervals import Interval, harmonic_interval, score_interval
from emendo.evaluate.results import Result, per_record
from emendo.evaluate.score_list import GROUPS, SCORES, Score

HARMONIC = ("efficacy", "paraphrase", "neighbourhood")
HARMONIC_ABOUT = "S, the harmonic mean of efficacy, paraphrase and neighbourhood"


def figures(results: Sequence[Result]) -> dict[str, dict[str, Interval | None]]:
    """Group -> score -> its mean and interval over the records; a score that no prompt speaks to is left out.

    Args:
        results: one for each record.
    """
    found: dict[str, dict[str, Interval | None]] = {}
    for score in SCORES:
        values = [v for v in per_record(results, score.value, score.kinds) if v is not None]
        if values:
            found.setdefault(score.group, {})[score.name] = score_interval(values, share=score.share)
    if (total := _harmonic(results)) is not None:
        found["counterfact"]["score"] = total
    return found


def values_of(results: Iterable[Result], group: str, name: str) -> list[float | None]:
    """One value of a score for each record, None where a record has no such prompt.

    Args:
        results: of the records.
        group: the score's protocol.
        name: the score.

    Raises:
        KeyError: there is no such score.
    """
    score = BY_NAME[group, name]
    return per_record(results, score.value, score.kinds)


BY_NAME: Mapping[tuple[str, str], Score] = {(score.group, score.name): score for score in SCORES}


def _harmonic(results: Sequence[Result]) -> Interval | None:
    columns = [values_of(results, "counterfact", name) for name in HARMONIC]
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    return harmonic_interval(rows)


def table() -> str:
    """The list of scores as a Markdown table."""
    lines = ["| protocol | score | taken how |", "| --- | --- | --- |"]
    for group, about in GROUPS.items():
        lines.append(f"| **{group}** | | {about} |")
        lines += [f"| | `{score.name}` | {score.about} |" for score in SCORES if score.group == group]
        lines += [f"| | `score` | {HARMONIC_ABOUT} |"] if group == "counterfact" else []
    return "\n".join(lines) + "\n"
