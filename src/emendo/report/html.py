"""One self-contained HTML page: what was measured, how, and what the edit did. It loads nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emendo._storage import new_file
from emendo.edits.edit import BaseEdit
from emendo.evaluate.before_after import Row
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.inspect import answer
from emendo.evaluate.results import Outcome, Result
from emendo.evaluate.scores import BY_NAME, GROUPS
from emendo.evaluate.sequential import Sequential
from emendo.report import plots
from emendo.report import plots as curves
from emendo.report._render import inline, number, render_page
from emendo.report.figures import NAMES
from emendo.report.markdown import ABOUT


def write_report(
    path: str | Path,
    *,
    info: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    edit: BaseEdit | None = None,
    rows: Sequence[Row] | None = None,
    norms: Mapping[str, float] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    sequential: Sequential | None = None,
) -> None:
    """Write the report; a part for which nothing is given is left out.

    Args:
        path: of the HTML file.
        info: name -> value, shown as they are: command, model, editor, seed, versions, timings. ``title`` and
            ``command`` have places of their own.
        evaluation: the scores and the table of records.
        edit: the edit that is shown.
        rows: its before/after table.
        norms: its size by site, from :meth:`Edit.relative_norms`; without an edit those of the evaluation.
        history: rows of training, for its curves.
        sequential: edits one after the other.

    Raises:
        StorageError: the file cannot be written.
    """
    page = render_report(
        info=info,
        evaluation=evaluation,
        edit=edit,
        rows=rows,
        norms=norms,
        history=history,
        sequential=sequential,
    )
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_report(
    *,
    info: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    edit: BaseEdit | None = None,
    rows: Sequence[Row] | None = None,
    norms: Mapping[str, float] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    sequential: Sequential | None = None,
) -> str:
    """The page of :func:`write_report` as text."""
    details = {key: value for key, value in info.items() if key not in ("title", "command")}
    measured = evaluation or sequential
    if norms is None and evaluation is not None:
        norms = evaluation.site_norms()
    return render_page(
        "report.html.j2",
        title=info.get("title", "Model editing report"),
        command=info.get("command"),
        details=_flat(details),
        names=NAMES,
        edit=edit,
        rows=rows or (),
        **_measured(evaluation, sequential),
        harness=measured.harness if measured is not None else None,
        target_plot=inline(plots.target_probabilities(rows)) if rows else None,
        norms_plot=inline(plots.site_norms(norms)) if norms else None,
        training_plot=inline(plots.training_curves(history)) if history else None,
        sequence=sequence(sequential) if sequential is not None else None,
    )


def _measured(evaluation: Evaluation | None, sequential: Sequential | None) -> dict[str, Any]:
    """What the template shows of an evaluation."""
    if evaluation is None:
        protocol = _flat(sequential.protocol) if sequential is not None else ()
        return {"figures": None, "protocol": protocol}
    forced = evaluation.scores("teacher_forced")
    generated = evaluation.scores("generated") if evaluation.has_generated else None
    groups = {"teacher forced": forced} | ({"free generation": generated} if generated else {})
    known, known_count = evaluation.locality_known()
    plain = evaluation.as_dict()
    local = [o for result in evaluation.results for o in result.outcomes if o.local]
    return {
        "figures": plain,
        "headline": [
            {
                "name": NAMES[name],
                "about": about,
                "forced": forced[name],
                "generated": generated and generated[name],
            }
            for name, about in HEADLINES.items()
        ],
        "known": known,
        "known_count": known_count,
        "protocol": _flat(evaluation.protocol),
        "protocols": protocols(plain),
        "scores_plot": inline(plots.score_bars(groups)),
        "scatter_plot": inline(plots.answer_scatter([o for r in evaluation.results for o in r.outcomes])),
        "kl_plot": inline(curves.kl_histogram(evaluation)) if local else None,
        **damage(evaluation, plain),
        "records": records(evaluation.results),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """``(name, value)`` pairs in words; nested mappings become ``outer: inner``."""
    pairs = []
    for key, value in values.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(map(str, value))))
        else:
            pairs.append((name, number(value)))
    return pairs


# --------------------
# An evaluation as the report's template shows it: protocols, damage, every record.

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
        "kind": NAMES[outcome.kind],
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
