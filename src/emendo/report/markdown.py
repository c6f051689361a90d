"""An evaluation in Markdown: every score with its interval, protocol by protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.scores import GROUPS, HARMONIC_ABOUT, SCORES
from emendo.evaluate.sequential import Sequential

ABOUT: Mapping[tuple[str, str], str] = {
    **{(score.group, score.name): score.about for score in SCORES},
    ("counterfact", "score"): HARMONIC_ABOUT,
}
"""Protocol and score -> how it is taken."""


def summary(found: Evaluation | Sequential, head: Mapping[str, Any]) -> str:
    """The page.

    Args:
        found: what was measured.
        head: what the run's ``run.json`` says.
    """
    plain = found.as_dict()
    lines = [f"# Evaluation of {plain['records']} facts", ""]
    lines += ["```bash", head["command"], "```", ""] if head.get("command") else []
    if isinstance(found, Sequential):
        lines += _sequence(plain)
    else:
        for group, scores in plain["scores"].items():
            lines += [
                f"## {group.replace('_', ' ')}",
                "",
                f"{GROUPS[group][0].upper()}{GROUPS[group][1:]}.",
                "",
            ]
            rows = ((name, _interval(score), ABOUT[group, name]) for name, score in scores.items())
            lines += [*_table(("score", "95% interval", "taken how"), rows), ""]
        lines += _damage(plain["damage"])
        cost = {"seconds per edit, alone": plain["seconds_per_edit"], **plain["cost"]}
        cost |= {"rank": plain["rank"], "relative norm": plain["relative_norm"]}
        known = ((name.replace("_", " "), _number(value)) for name, value in cost.items())
        lines += ["## cost", "", *_table(("what", "value"), known), ""]
    lines += _harness(plain["lm_eval"]) if plain["lm_eval"] else []
    lines += ["## how", ""]
    lines += _table(("what", "value"), ((k.replace("_", " "), str(v)) for k, v in plain["protocol"].items()))
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in head.get("versions", {}).items()), ""]
    return "\n".join(lines)


def _sequence(plain: Mapping[str, Any]) -> list[str]:
    forced, free = [], []
    for point in plain["checkpoints"]:
        kept, said = (point["retained"].get(group, {}) for group in ("teacher_forced", "free_generation"))
        after = point["right_after"].get("teacher_forced", {}).get("edit_success")
        cells = [after, *(kept.get(name) for name in ("edit_success", "generalisation", "locality"))]
        perplexity = _number(point["damage"].get("perplexity"))
        forced.append((str(point["edits"]), *map(_maybe, cells), perplexity))
        free.append((str(point["edits"]), *(_maybe(said.get(name)) for name in _SAID)))
    head = ("edits", "right after: success", "retained: success", "generalisation", "locality", "perplexity")
    lines = ["## one after the other", "", "Teacher forced:", "", *_table(head, forced), ""]
    if any("free_generation" in point["retained"] for point in plain["checkpoints"]):
        names = ("edits", *(f"retained: {name.replace('_', ' ')}" for name in _SAID))
        lines += ["Free generation, asked again after so many edits:", "", *_table(names, free), ""]
    return lines


_SAID = ("edit_success", "edit_success_full", "generalisation", "generalisation_full", "locality")
"""Scores of free generation that are shown of a sequence."""


def _maybe(cell: Mapping[str, Any] | None) -> str:
    return _interval(cell) if cell else "-"


def _damage(damage: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not damage:
        return []
    head = ("what", "clean", "after an edit, mean", "median", "lowest", "highest", "edits")
    rows = (
        (name, _number(d["clean"]), _interval(d), *(_number(d[k]) for k in ("median", "min", "max", "edits")))
        for name, d in damage.items()
    )
    return ["## damage", "", *_table(head, rows), ""]


def _harness(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "## damage: tasks of the evaluation harness",
        "",
        f"{found['edits'][0].upper()}{found['edits'][1:]}.",
    ]
    if not found["scores"]:
        return [*lines, ""]
    how = found["harness"]
    limit = "" if how["limit"] is None else f", the first {how['limit']} questions of each task"
    lines += ["", f"lm-eval {how['lm_eval']}{limit}; prompts {how['prompts']}; ± is its standard error.", ""]
    rows = (
        (name, *(_error(s[side], s[f"{side}_stderr"]) for side in ("before", "after")), str(s["questions"]))
        for name, s in found["scores"].items()
    )
    return [*lines, *_table(("task: metric", "clean", "after", "questions"), rows), ""]


def _error(value: float | None, error: float | None) -> str:
    return _number(value) if error is None else f"{_number(value)} ± {_number(error)}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _interval(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "no number"
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
