"""The tables of an evaluation, from its figures: scores, damage, retention, single records, two runs side by side.

``figures`` is what ``as_dict()`` of an :class:`~emendo.evaluate.Evaluation` or of a
:class:`~emendo.evaluate.sequential.Sequential` returns, and what ``--json`` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from emendo.evaluate.inspect import answer
from emendo.evaluate.scores import ALIASES, BY_NAME, HARMONIC_ABOUT
from emendo.report.tables import NO_NUMBER, Cell, Column, Table, chance, number

if TYPE_CHECKING:
    from emendo.evaluate import Answer, Evaluation, Outcome, Result, Row
    from emendo.evaluate.inspect import Line

NAMES: Mapping[str, str] = {
    "edit": "edited prompt",
    "paraphrase": "paraphrase",
    "neighbour": "near neighbour",
    "unrelated": "unrelated",
    "told": "with the fact in context",
    "reversed": "reversed relation",
    "one_hop": "one hop on",
    "two_hop": "two hops on",
    "alias": "alias",
    "edit_success": "edit success",
    "generalisation": "generalisation",
    "locality": "locality",
    "locality_neighbours": "locality, near neighbours",
    "locality_unrelated": "locality, unrelated",
}
"""Kinds of prompts and scores, as people read them."""

GROUPS = {
    "edit": "edited prompt",
    "paraphrase": "paraphrases",
    "neighbour": "near neighbours",
    "unrelated": "unrelated prompts",
}
"""Headings over several prompts of one kind."""

_DAMAGE = {"perplexity": "perplexity of plain text", "ability": "questions of other kinds answered"}
_RETENTION = (
    ("right after its edit: edit success", "right_after", "teacher_forced", "edit_success"),
    ("right after its edit: generalisation", "right_after", "teacher_forced", "generalisation"),
    ("asked again: edit success", "retained", "teacher_forced", "edit_success"),
    ("asked again: generalisation", "retained", "teacher_forced", "generalisation"),
    ("asked again: locality", "retained", "teacher_forced", "locality"),
    ("asked again, generated: edit success", "retained", "free_generation", "edit_success"),
    ("asked again, generated: the target and no more", "retained", "free_generation", "edit_success_full"),
    ("asked again, generated: generalisation", "retained", "free_generation", "generalisation"),
    ("asked again, generated: generalisation, no more", "retained", "free_generation", "generalisation_full"),
    ("asked again, generated: locality", "retained", "free_generation", "locality"),
)  # heading, when it was asked, protocol, score
_SIGNIFICANT = 0.05


def spelled(name: str) -> str:
    """A key of the figures as people read it."""
    return NAMES.get(name) or name.replace("_", " ")


def scores(figures: Mapping[str, Any]) -> Table:
    """Edit success, generalisation and locality, teacher forced and by free generation."""
    generated = figures.get("generated")
    how = figures["protocol"]["edits"].partition(", each")[0]
    columns = [Column(f"{figures['records']} facts, edited {how}")]
    columns += [Column("teacher forced", "interval", "no such prompt")]
    columns += [Column("free generation", "interval", "no such prompt")] if generated else []
    rows: list[list[Any]] = []
    for name, forced in figures["teacher_forced"].items():
        heading = (
            f"  {spelled(name).removeprefix('locality, ')}"
            if "_" in name and "loc" in name
            else spelled(name)
        )
        rows.append([heading, forced, *([generated[name]] if generated else [])])
    if generated:
        rows.append(["  whole text unchanged", Cell(""), generated["locality_whole_text"]])
    return Table(columns, rows, note=_timed(figures))


def _timed(figures: Mapping[str, Any]) -> str:
    return f"In brackets the 95% interval; {figures['seconds_per_edit']:.2f} s per edit."


def damage(figures: Mapping[str, Any]) -> Table | None:
    """The effect of the edits away from their facts; None if it was not measured."""
    if not figures.get("damage"):
        return None
    columns = [Column("away from the edited facts"), Column("clean model", "number", NO_NUMBER)]
    columns += [Column("after an edit: mean", "interval", NO_NUMBER)]
    columns += [Column(name, "number", NO_NUMBER) for name in ("median", "lowest", "highest")]
    rows = [
        [_DAMAGE.get(name) or spelled(name), d["clean"], d, d["median"], d["min"], d["max"], d["edits"]]
        for name, d in figures["damage"].items()
    ]
    return Table([*columns, Column("edits", "count")], rows)


def routing(figures: Mapping[str, Any]) -> Table | None:
    """How the prompts found their edits in a memory; None where each edit was made alone."""
    found = figures.get("routing")
    if not found:
        return None
    columns = [Column("routing"), Column("share", "share"), Column("prompts", "count")]
    rows: list[list[Any]] = [
        [f"in scope: {heading}", found[name], found["prompts"]]
        for name, heading in (("right", "the right edit"), ("wrong", "a wrong edit"), ("none", "none"))
    ]
    edited = found.get("edited_neighbours", {})
    if "right" in edited:
        rows.append(["neighbours that another edit is about: that edit", edited["right"], edited["prompts"]])
    rows += [
        [f"out of scope, an edit fires: {spelled(kind)}", share, found["out_of_scope"][kind]]
        for kind, share in found["false_fires"].items()
    ]
    others = found.get("locality_of_others", {})
    said = [f"{value:.3f} {spelled(name)}" for name, value in others.items() if value is not None]
    return Table(columns, rows, note=f"Locality without those neighbours: {', '.join(said)}." if said else "")


def harness(found: Mapping[str, Any] | None) -> Table | None:
    """Tasks of the evaluation harness, from ``lm_eval`` of the figures; None where none was asked for."""
    if not found:
        return None
    note = f"lm-eval: {found['edits']}."
    if not found["scores"]:
        return Table((), (), note=note)
    settings = found["harness"]
    limit = "" if settings["limit"] is None else f", the first {settings['limit']} questions of each task"
    note += f" Version {settings['lm_eval']}{limit}; prompts {settings['prompts']}; ± is the harness's standard error."
    columns = [Column("lm-eval task: metric"), Column("clean model", "measured"), Column("after", "measured")]
    columns += [Column("difference", "number"), Column("questions", "count"), Column("shots", "count")]
    rows = []
    for name, score in found["scores"].items():
        sides = [(score[side], score[f"{side}_stderr"]) for side in ("before", "after")]
        known = score["before"] is not None and score["after"] is not None
        gap = f"{score['after'] - score['before']:+.4g}" if known else None
        cells = [side if side[0] is not None else Cell(NO_NUMBER) for side in sides]
        rows.append([name, *cells, None if gap is None else Cell(gap), score["questions"], score["shots"]])
    return Table(columns, rows, note=note)


class Score(NamedTuple):
    """One score of an evaluation: its key, its interval as JSON values, its definition, and whether it is a share."""

    name: str
    value: Mapping[str, float | None]
    about: str
    share: bool


def protocols(figures: Mapping[str, Any]) -> Iterator[tuple[str, list[Score]]]:
    """Each protocol's name with its scores, deprecated keys left out."""
    for group, values in figures["scores"].items():
        scores = (BY_NAME.get((group, name)) for name in values)
        yield (
            group,
            [
                Score(
                    name,
                    value,
                    HARMONIC_ABOUT if score is None else score.about,
                    score is None or score.share,
                )
                for (name, value), score in zip(values.items(), scores, strict=True)
                if (group, name) not in ALIASES
            ],
        )


def retention(figures: Mapping[str, Any]) -> Table:
    """Scores of a sequence of edits at each of its checkpoints."""
    points = figures["checkpoints"]
    columns = [
        Column("edits one after the other"),
        *(Column(f"after {p['edits']:,}", "interval") for p in points),
    ]
    rows: list[list[Any]] = []
    for heading, when, group, name in _RETENTION:
        cells = [point[when].get(group, {}).get(name) for point in points]
        if any(cells):
            rows.append([heading, *cells])
    if any(point["refused"] is not None for point in points):
        rows.append(["edits that the guard refused", *(Cell(point["refused"], "count") for point in points)])
    for name, clean in figures["clean"].items():
        heading = f"{spelled(name)} (clean {NO_NUMBER if clean is None else number(clean)})"
        rows.append([heading, *(_number(point["damage"].get(name)) for point in points)])
    if any(point["relative_norm"] for point in points):
        rows.append(["size of all edits together", *(_number(p["relative_norm"], "size") for p in points)])
    return Table(columns, rows, note=_timed(figures))


def _number(value: float | None, kind: Any = "number") -> Cell:
    return Cell(NO_NUMBER) if value is None else Cell(value, kind)


def before_after(rows: Sequence[Row]) -> Table:
    """The most probable answers without and with an edit, and the probability of its target."""
    columns = (
        Column("prompt", width=44),
        Column("before", width=26),
        Column("after", width=26),
        Column(f"P({rows[0].target})", "change"),
        Column("", "verdict"),
    )
    lines: list[Any] = []
    kind = None
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            lines.append(GROUPS[kind])
        right = row.reached if kind in ("edit", "paraphrase") else not row.changed
        change = (row.target_before, row.target_after)
        lines.append((row.prompt, _answers(row.before), _answers(row.after), change, right))
    note = f"✓: the edited prompt and its paraphrases give {rows[0].target!r}, the others answer as before"
    return Table(columns, lines, note=note)


def _answers(answers: Sequence[Answer]) -> tuple[Cell, ...]:
    return tuple(Cell(answer.text, aside=chance(answer.probability)) for answer in answers) or (Cell(""),)


def worst(evaluation: Evaluation, rows: Sequence[tuple[Result, float]], by: str | None) -> Table:
    """The records with the worst scores.

    Args:
        evaluation: the run.
        rows: what :func:`emendo.evaluate.inspect.worst` returns.
        by: the score that they are ranked by; None for the mean of the three main scores.
    """
    places = {id(result): str(place) for place, result in enumerate(evaluation.results, 1)}
    lines = []
    for result, value in rows:
        edit = result.outcomes[0]
        name = result.record.id or places[id(result)]
        lines.append((name, edit.prompt, edit.answer, _spoken(edit, "before"), _spoken(edit, "after"), value))
    columns = [Column(name) for name in ("record", "prompt", "target", "before", "after")]
    return Table([*columns, Column(by or "mean", "number")], lines)


def record(result: Result) -> Table:
    """Every answer of one record."""
    rows: list[Any] = []
    kind = None
    for outcome in result.outcomes:
        if outcome.kind != kind:
            kind = outcome.kind
            rows.append(spelled(kind))
        expected = f"{outcome.answer}, unchanged" if outcome.local else outcome.answer
        good = outcome.teacher_forced if outcome.generated is None else outcome.generated
        rows.append((outcome.prompt, expected, _spoken(outcome, "before"), _spoken(outcome, "after"), good))
    figures = {"rank": str(result.rank), "size": f"{result.norm:.3%}", "seconds": f"{result.seconds:.3f}"}
    figures |= {name.replace("_", " "): number(value) for name, value in result.damage.items()}
    columns = [Column(name) for name in ("prompt", "expected", "before", "after")]
    note = "; ".join(f"{name} {value}" for name, value in figures.items())
    return Table([*columns, Column("", "verdict")], rows, note=note)


def _spoken(outcome: Outcome, side: str) -> tuple[Cell, ...]:
    """The generated answer, if any, over the probability and the rank of the expected one."""
    text, rank = answer(outcome, side), getattr(outcome, f"rank_{side}")
    place = "" if rank is None else f", rank {rank:,}"
    likely = f"P {getattr(outcome, side):.3g}{place}"
    return (Cell(likely),) if text is None else (Cell(text), Cell(f"({likely})", tone="soft"))


def comparison(lines: Sequence[Line], first: str, second: str) -> Table:
    """Two runs side by side.

    Args:
        lines: what :func:`emendo.evaluate.inspect.side_by_side` returns.
        first: the name of the first run.
        second: the name of the second run.
    """
    columns = [
        Column("score"),
        Column("A", "number"),
        Column("B", "number"),
        Column("B - A (95%)", "difference"),
    ]
    rows: list[Any] = []
    group = None
    for line in lines:
        if line.group != group:
            group = line.group
            rows.append(spelled(group))
        found, gap = line.found, line.found.difference
        tone: Any = ""
        if found.p < _SIGNIFICANT and line.better and gap.mean:
            tone = "good" if gap.mean * line.better > 0 else "bad"
        chosen = Cell(gap, "difference", tone=tone)
        rows.append(
            (spelled(line.name), found.first, found.second, chosen, Cell(f"{found.p:.2g}"), found.facts)
        )
    note = (
        f"A: {first}, B: {second}; green and red: better and worse with p < {_SIGNIFICANT}, each score by itself, "
        "without correction for looking at many"
    )
    return Table([*columns, Column("p", "number"), Column("facts", "count")], rows, note=note)


def pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values as text; a nested mapping becomes ``outer: inner``."""
    found = []
    for key, value in values.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            found += pairs(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value))))
        elif isinstance(value, float):
            found.append((name, number(value)))
        else:
            found.append((name, str(value)))
    return found
