"""One self-contained HTML page about an edit, an evaluation or both; it loads nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emendo._outputs import REPORT, claim
from emendo._storage import new_file
from emendo.edits.edit import BaseEdit
from emendo.evaluate.before_after import Row
from emendo.evaluate.evaluation import Evaluation, SequentialEvaluation
from emendo.evaluate.inspect import answer
from emendo.evaluate.results import MAIN, Outcome, Result
from emendo.evaluate.scores import GROUPS
from emendo.report import figures, plots
from emendo.report._render import inline, render_page
from emendo.report.figures import NAMES
from emendo.report.tables import Column, Table

_WORST = 8  # edits that are listed as the most harmful ones
_TITLES = {"kl": "Divergence", "counterfact": "CounterFact", "zsre": "zsRE", "mend": "The MEND paper"}
_HEADLINES = dict(
    zip(
        MAIN,
        (
            "the edited prompt gives the target",
            "paraphrases give the target",
            "other prompts answer as before",
        ),
        strict=True,
    )
)


def write_report(
    path: str | Path,
    *,
    info: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    edit: BaseEdit | None = None,
    rows: Sequence[Row] | None = None,
    norms: Mapping[str, float] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    sequential: SequentialEvaluation | None = None,
) -> None:
    """Write the report; parts that are not given are left out.

    Args:
        path: of the HTML file.
        info: name -> value, shown as they are: model, editor, seed, versions, timings. ``title`` and ``command`` have
            their own places on the page.
        evaluation: shown with its scores and all its records.
        edit: the edit of the before/after table.
        rows: the before/after table.
        norms: the edit's size by site, from :meth:`Edit.relative_norms`; by default that of the evaluation's edits.
        history: rows of training, shown as curves.
        sequential: an evaluation of edits one after the other.

    Raises:
        StorageError: the file cannot be written, or is not a report of emendo.
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
    claim(path, REPORT)
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def render_report(
    *,
    info: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    edit: BaseEdit | None = None,
    rows: Sequence[Row] | None = None,
    norms: Mapping[str, float] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    sequential: SequentialEvaluation | None = None,
) -> str:
    """The page of :func:`write_report` as text."""
    measured = evaluation or sequential
    values = measured.as_dict() if measured is not None else None
    if norms is None and evaluation is not None:
        norms = evaluation.site_norms()
    return render_page(
        "report.html.j2",
        title=info.get("title", "Model editing report"),
        command=info.get("command"),
        details=figures.pairs({k: v for k, v in info.items() if k not in ("title", "command")}),
        names=NAMES,
        edit=edit,
        rows=rows or (),
        values=values,
        protocol=figures.pairs(measured.protocol) if measured is not None else (),
        harness=figures.harness(measured.harness) if measured is not None else None,
        target_plot=inline(plots.target_probabilities(rows)) if rows else None,
        norms_plot=inline(plots.site_norms(norms)) if norms else None,
        training_plot=inline(plots.training_curves(history)) if history else None,
        figures=_evaluation(evaluation, values) if evaluation is not None and values is not None else None,
        sequence=_sequence(sequential) if sequential is not None else None,
    )


def _evaluation(evaluation: Evaluation, values: Mapping[str, Any]) -> dict[str, Any]:
    """The template's values for an evaluation."""
    forced = evaluation.scores("teacher_forced")
    generated = evaluation.scores("generated") if evaluation.has_generated else None
    groups = {"teacher forced": forced} | ({"free generation": generated} if generated else {})
    outcomes = [outcome for result in evaluation.results for outcome in result.outcomes]
    edits = {r.edit: r for r in reversed(evaluation.results) if "perplexity" in r.damage}
    has_curve = edits and "perplexity" in evaluation.clean
    return {
        "headline": [
            {
                "name": NAMES[name],
                "about": about,
                "forced": forced[name],
                "generated": generated and generated[name],
            }
            for name, about in _HEADLINES.items()
        ],
        "known": evaluation.locality_known(),
        "protocols": [
            {
                "name": _TITLES.get(name) or figures.spelled(name).capitalize(),
                "about": GROUPS[name],
                "scores": scores,
            }
            for name, scores in figures.protocols(values)
        ],
        "scores_plot": inline(plots.score_bars(groups)),
        "scatter_plot": inline(plots.answer_scatter(outcomes)),
        "kl_plot": inline(plots.kl_histogram(evaluation)) if any(o.local for o in outcomes) else None,
        "damage": figures.damage(values),
        "routing": figures.routing(values),
        "harmful": _harmful([*edits.values()]) if edits else None,
        "perplexity_plot": inline(plots.perplexity_curve(evaluation)) if has_curve else None,
        "records": [_record(result) for result in evaluation.results],
    }


def _harmful(edits: Sequence[Result]) -> Table:
    """The edits after which plain text has the highest perplexity."""

    def harm(result: Result) -> float:
        value = result.damage["perplexity"]
        return value if math.isfinite(value) else math.inf

    order = sorted(edits, key=lambda result: -harm(result))
    rows = [(r.outcomes[0].prompt, r.outcomes[0].answer, r.damage["perplexity"]) for r in order[:_WORST]]
    columns = (Column("edit"), Column("target"), Column("perplexity", "number"))
    return Table(columns, rows, "The edits that harm plain text most")


def _sequence(found: SequentialEvaluation) -> dict[str, Any]:
    values = found.as_dict()
    return {"table": figures.retention(values), "plot": inline(plots.retention_curves(values))}


def _record(result: Result) -> dict[str, Any]:
    """A line of the table of facts, with all its prompts."""
    first = result.outcomes[0]
    return {
        "id": result.record.id,
        "prompt": first.prompt,
        "target": first.answer,
        "before": answer(first, "before"),
        "after": answer(first, "after"),
        "probability": (first.before, first.after),
        "scores": [(result.score(name), result.score(name, "generated")) for name in MAIN],
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
