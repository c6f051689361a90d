"""An evaluation as the report's template shows it: protocols, damage, every record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emendo.evaluate import curves, plots
from emendo.evaluate.checkpoints import Sequential
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.page import inline
from emendo.evaluate.results import Outcome, Result
from emendo.evaluate.score_list import GROUPS
from emendo.evaluate.scores import BY_NAME
from emendo.evaluate.summary import ABOUT
from emendo.evaluate.tracing import answer

WORST = 8
"""Edits of which the report says that they did most to plain text."""

TITLES = {"kl": "Divergence", "counterfact": "CounterFact", "zsre": "zsRE", "mend": "The MEND paper"}
"""Protocols that are called otherwise on the page."""

HEADLINES = {
    "edit_success": "the edited prompt gives the target",
    "generalisation": "rewordings give the target",
    "locality": "other prompts answer as before",
}


def protocols(plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each protocol with its scores; a score between 0 and 1 can be drawn as a bar.

    Args:
        plain: what ``as_dict()`` of an evaluation gives.
    """
    return [
        {
            "name": TITLES.get(group) or group.replace("_", " ").capitalize(),
            "about": GROUPS[group],
            "scores": [
                {
                    "name": name.replace("_", " "),
                    "about": ABOUT[group, name],
                    "value": value,
                    "bar": value["mean"] is not None and _is_share(group, name),
                }
                for name, value in scores.items()
            ],
        }
        for group, scores in plain["scores"].items()
    ]


def damage(evaluation: Evaluation, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The table of damage, and the edits that did most to plain text.

    Args:
        evaluation: the run.
        plain: what its ``as_dict()`` gives.
    """
    rows = [{"name": name.replace("_", " "), **value} for name, value in plain["damage"].items()]
    edits = {r.edit: r for r in reversed(evaluation.results) if "perplexity" in r.damage}
    order = sorted(edits.values(), key=lambda r: -_or_infinite(r.damage["perplexity"]))
    harmful = [
        {"prompt": r.outcomes[0].prompt, "target": r.outcomes[0].answer, "value": r.damage["perplexity"]}
        for r in order[:WORST]
    ]
    plot = inline(curves.perplexity_curve(evaluation)) if edits and "perplexity" in evaluation.clean else None
    return {"damage": rows, "harmful": harmful, "perplexity_plot": plot}


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The lines of the table of records, each with all its prompts."""
    return [_line(result) for result in results]


def sequence(found: Sequential) -> dict[str, Any]:
    """The curves and the table of edits one after the other."""
    plain = found.as_dict()
    rows = [
        {
            "edits": point["edits"],
            "refused": point["refused"],
            "after": point["right_after"].get("teacher_forced", {}),
            "kept": point["retained"].get("teacher_forced", {}),
            "said": point["retained"].get("free_generation", {}),
            "damage": point["damage"],
            "norm": point["relative_norm"],
        }
        for point in plain["checkpoints"]
    ]
    said = any(row["said"] for row in rows)
    return {"rows": rows, "said": said, "plot": inline(curves.retention_curves(plain)), **plain}


def _is_share(group: str, name: str) -> bool:
    """Whether a score is between 0 and 1; that of CounterFact as a whole is."""
    return (group, name) not in BY_NAME or BY_NAME[group, name].share


def _line(result: Result) -> dict[str, Any]:
    first = result.outcomes[0]
    return {
        "id": result.record.id,
        "prompt": first.prompt,
        "target": first.answer,
        "before": answer(first, "before"),
        "after": answer(first, "after"),
        "probability": (first.before, first.after),
        "scores": [(result.score(name), result.score(name, "generated")) for name in HEADLINES],
        "perplexity": result.damage.get("perplexity"),
        "prompts": [_prompt(outcome) for outcome in result.outcomes],
    }


def _prompt(outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": plots.NAMES[outcome.kind],
        "prompt": outcome.prompt,
        "answer": outcome.answer,
        "local": outcome.local,
        "before": answer(outcome, "before"),
        "after": answer(outcome, "after"),
        "probability": (outcome.before, outcome.after),
        "good": outcome.teacher_forced if outcome.generated is None else outcome.generated,
    }


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
