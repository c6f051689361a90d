"""The summary of an evaluation in Markdown: every score with its interval, protocol by protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from emendo.evaluate.evaluation import Evaluation, SequentialEvaluation
from emendo.evaluate.scores import GROUPS
from emendo.report import figures
from emendo.report.tables import Cell, Column, Table, markdown_code, markdown_text, to_markdown


def summary(found: Evaluation | SequentialEvaluation, head: Mapping[str, Any]) -> str:
    """The page.

    Args:
        found: the evaluation.
        head: the contents of the run's ``run.json``.
    """
    values = found.as_dict()
    parts = [f"# Evaluation of {values['records']} facts"]
    parts += [markdown_code(head["command"], "bash")] if head.get("command") else []
    parts += _sequence(values) if isinstance(found, SequentialEvaluation) else _evaluation(values)
    if (tasks := figures.harness(values["lm_eval"])) is not None:
        parts += ["## damage: tasks of the evaluation harness", to_markdown(tasks)]
    parts.append(to_markdown(_pairs("how", values["protocol"])))
    versions = (f"{name} {version}" for name, version in head.get("versions", {}).items())
    parts.append(f"Versions: {markdown_text(', '.join(versions))}")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _sequence(values: Mapping[str, Any]) -> Iterator[str]:
    yield "## one after the other"
    yield to_markdown(figures.retention(values))


def _evaluation(values: Mapping[str, Any]) -> Iterator[str]:
    for name, rows in figures.protocols(values):
        yield f"## {figures.spelled(name)}"
        yield f"{GROUPS[name][0].upper()}{GROUPS[name][1:]}."
        columns = (Column("score"), Column("95% interval", "interval", "no number"), Column("definition"))
        yield to_markdown(Table(columns, [(row.name, row.value, row.about) for row in rows]))
    if (routing := figures.routing(values)) is not None:
        yield "## routing"
        yield to_markdown(routing)
    if (damage := figures.damage(values)) is not None:
        yield "## damage"
        yield to_markdown(damage)
    cost: dict[str, Any] = {"seconds per edit, alone": values["seconds_per_edit"], **values["cost"]}
    yield to_markdown(_pairs("cost", cost | {k: values[k] for k in ("rank", "relative_norm")}))


def _pairs(title: str, values: Mapping[str, Any]) -> Table:
    rows = [(Cell(name), value) for name, value in figures.pairs(values)]
    return Table((Column("name"), Column("value")), rows, title)
