"""The report's plots of damage and of edits one after the other, as SVG or PNG bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emendo.evaluate.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    SKY,
    Format,
    axes_of,
    legend,
    panels,
    render,
)
from emendo.evaluate.evaluation import Evaluation

_FLOOR = 1e-6
"""The smallest KL that is told apart, in nats."""
_SERIES = (
    ("right_after", "teacher_forced", "edit_success", "edit success right after the edit", SKY, "--"),
    ("retained", "teacher_forced", "edit_success", "edit success, asked again", BLUE, "-"),
    ("retained", "free_generation", "edit_success", "edit success, asked again, generated", BLUE, ":"),
    ("retained", "teacher_forced", "generalisation", "generalisation, asked again", GREEN, "-"),
    ("retained", "teacher_forced", "locality", "locality", ORANGE, "-"),
)
"""When it was asked, protocol, score, its name, colour, dashes."""


def kl_histogram(evaluation: Evaluation, image: Format = "svg") -> bytes:
    """How many locality prompts moved how far, on a logarithmic scale; the left bar holds all below 1e-6.

    Args:
        evaluation: the run.
        image: the format.
    """
    groups = {
        "near neighbours": (ORANGE, _kl(evaluation, "neighbour")),
        "unrelated": (GREEN, _kl(evaluation, "unrelated")),
        "with the fact told before": (SKY, _kl(evaluation, "told")),
    }
    kept = {label: found for label, found in groups.items() if found[1]}
    top = max([0.0, *(max(values) for _, values in kept.values())])
    edges = [math.log10(_FLOOR) + i / 3 for i in range(3 * max(7, math.ceil(top + 6)) + 1)]
    figure, axes = axes_of(5.2, 3.6)
    for label, (colour, values) in kept.items():
        weights = [1 / len(values)] * len(values)
        axes.hist(values, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.3)
        axes.hist(values, edges, weights=weights, histtype="step", color=colour, lw=1.6, label=label)
    ticks = [-6, -4, -2, 0, 2]
    axes.set_xticks(ticks, [r"$\leq 10^{-6}$", *(rf"$10^{{{t}}}$" for t in ticks[1:])])
    axes.set_xlim(edges[0] - 0.4, edges[-1])
    axes.set_xlabel("KL(clean || edited) at the answer, in nats", color=INK)
    axes.set_ylabel("share of prompts", color=INK)
    axes.grid(axis="y", color=INK, alpha=0.1, lw=0.8)
    legend(axes, figure)
    return render(figure, image)


def _kl(evaluation: Evaluation, kind: str) -> list[float]:
    values = (o.kl for result in evaluation.results for o in result.outcomes if o.kind == kind)
    return [math.log10(max(value, _FLOOR)) for value in values if math.isfinite(value)]


def perplexity_curve(evaluation: Evaluation, image: Format = "svg") -> bytes:
    """The perplexity of plain text after each edit, from the least to the greatest, beside the clean model's.

    Args:
        evaluation: the run.
        image: the format.
    """
    edits = {result.edit: result.damage["perplexity"] for result in evaluation.results if result.damage}
    values = sorted(value for value in edits.values() if math.isfinite(value))
    figure, axes = axes_of(5.2, 3.6)
    axes.plot(
        [100 * (i + 1) / len(edits) for i in range(len(values))], values, color=BLUE, lw=1.8, label="edited"
    )
    clean = evaluation.clean["perplexity"]
    axes.axhline(clean, color=RED, lw=1.2, ls=(0, (4, 3)), label=f"clean: {clean:.4g}")
    if values and max(values) > 5 * clean:
        axes.set_yscale("log")
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of the edits, least perplexity first", color=INK)
    axes.set_ylabel("perplexity", color=INK)
    axes.grid(color=INK, alpha=0.1, lw=0.8)
    legend(axes, figure)
    return render(figure, image)


def retention_curves(figures: Mapping[str, Any], image: Format = "svg") -> bytes:
    """Scores on the left and perplexity on the right over the number of edits in the model.

    Args:
        figures: what ``as_dict()`` of a sequence gives.
        image: the format.
    """
    figure, (left, right) = panels(10.4, 3.6, 2)
    points = figures["checkpoints"]
    for when, group, name, label, colour, dashes in _SERIES:
        found = [(p["edits"], p[when].get(group, {}).get(name)) for p in points]
        kept = [(n, s) for n, s in found if s and s["mean"] is not None]
        if kept:
            counts = [n for n, _ in kept]
            left.plot(
                counts, [s["mean"] for _, s in kept], dashes, marker="o", ms=4, color=colour, label=label
            )
            low, high = ([s[bound] for _, s in kept] for bound in ("low", "high"))
            left.fill_between(counts, low, high, color=colour, alpha=0.08, lw=0)
    left.set_ylim(-0.03, 1.03)
    _ends(left, points)
    seen = [(p["edits"], p["damage"].get("perplexity")) for p in points]
    kept_seen = [(n, value) for n, value in seen if value is not None]
    if kept_seen:
        right.plot(*zip(*kept_seen, strict=True), marker="o", ms=4, color=BLUE, label="perplexity")
        right.axhline(figures["clean"]["perplexity"], color=RED, lw=1.2, ls=(0, (4, 3)), label="clean model")
        if max(value for _, value in kept_seen) > 5 * figures["clean"]["perplexity"]:
            right.set_yscale("log")
        _ends(right, points)
    else:
        right.set_visible(False)
    for axes in (left, right):
        _below(axes)
    return render(figure, image)


def _ends(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    counts = [point["edits"] for point in points]
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("edits in the model", color=INK)
    axes.grid(color=INK, alpha=0.1, lw=0.8)


def _below(axes: Any) -> None:
    """A legend in two columns above the plot."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "frameon": False}
        axes.legend(handles, labels, labelcolor=INK, fontsize=9, borderaxespad=0.2, **place)
