"""One self-contained HTML page: what was measured, how, and what the edit did. It loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emendo.edit import AnyEdit
from emendo.evaluate import curves, plots, sections
from emendo.evaluate.checkpoints import Sequential
from emendo.evaluate.compare import Row
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.page import inline, number, render_page
from emendo.files import new_file


def write_report(
    path: str | Path,
    *,
    info: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    edit: AnyEdit | None = None,
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
        norms: its size by site, from :meth:`emendo.edit.Edit.relative_norms`; without an edit those of the evaluation.
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
    edit: AnyEdit | None = None,
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
        names=plots.NAMES,
        edit=edit,
        rows=rows or (),
        **_measured(evaluation, sequential),
        harness=measured.harness if measured is not None else None,
        target_plot=inline(plots.target_probabilities(rows)) if rows else None,
        norms_plot=inline(plots.site_norms(norms)) if norms else None,
        training_plot=inline(plots.training_curves(history)) if history else None,
        sequence=sections.sequence(sequential) if sequential is not None else None,
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
                "name": plots.NAMES[name],
                "about": about,
                "forced": forced[name],
                "generated": generated and generated[name],
            }
            for name, about in sections.HEADLINES.items()
        ],
        "known": known,
        "known_count": known_count,
        "protocol": _flat(evaluation.protocol),
        "protocols": sections.protocols(plain),
        "scores_plot": inline(plots.score_bars(groups)),
        "scatter_plot": inline(plots.answer_scatter([o for r in evaluation.results for o in r.outcomes])),
        "kl_plot": inline(curves.kl_histogram(evaluation)) if local else None,
        **sections.damage(evaluation, plain),
        "records": sections.records(evaluation.results),
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
