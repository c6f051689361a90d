"""A plot of a ledger's health, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emendo.report.plots import BLUE, GREEN, INK, ORANGE, RED, Format, legend, panels, render


def health_plot(
    operations: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]], form: Format
) -> bytes:
    """Plot the figures of the guard and of later examinations.

    Args:
        operations: the ledger's operations as JSON values, in any order.
        checks: its checks as JSON values.
        form: format of the picture.

    Returns:
        The picture.
    """
    steps = sorted((step for step in operations if step["health"]), key=lambda step: step["id"])
    later = sorted(checks, key=lambda check: (check["operation"], check["id"]))
    at, where = [step["id"] for step in steps], [check["operation"] for check in later]
    figure, (text, probes, kept) = panels(10.5, 3.2, 3)
    for axes, name, drift, factor in (
        (text, "total_perplexity", "perplexity", 1),
        (probes, "total_changed", "changed", 100),
    ):
        values = [_number(step["health"], name, factor=factor) for step in steps]
        _plot(axes, at, values, BLUE, "right after each edit", marker=".", linewidth=1.4)
        values = [_number(check["figures"], "drift", drift, factor=factor) for check in later]
        _plot(axes, where, values, ORANGE, "examined", linestyle="none", marker="D", markersize=4)
    retention = [_number(check["figures"], "retention", factor=100) for check in later]
    _plot(kept, where, retention, ORANGE, "examined", linestyle="none", marker="D", markersize=4)
    _plot(kept, where, retention, GREEN, None, linewidth=1.2, zorder=1)
    for step in steps:
        if step["forced"]:
            for axes in (text, probes):
                axes.axvline(step["id"], color=RED, linewidth=0.8, alpha=0.5)
    for axes, title in (
        (text, "perplexity of plain text, x the base model's"),
        (probes, "probes with another answer, %"),
        (kept, "targets that are still the answer, %"),
    ):
        axes.set_title(title, loc="left", fontsize=9, color=INK, pad=18)
        axes.set_xlabel("operation", fontsize=9, color=INK)
        axes.grid(axis="y", color=INK, alpha=0.12)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.set_xlim(0.5, max([*at, *where, 1]) + 0.5)
    kept.set_ylim(0, 104)
    probes.set_ylim(0, max(5.0, probes.get_ylim()[1]))
    legend(text)
    return render(figure, form)


def _number(figures: Any, *keys: str, factor: float) -> float | None:
    """A number inside stored figures; None where it is missing or anything else."""
    for key in keys:
        figures = figures.get(key) if isinstance(figures, Mapping) else None
    return factor * figures if isinstance(figures, int | float) else None


def _plot(
    axes: Any, at: Sequence[int], values: Sequence[float | None], colour: str, label: str | None, **style: Any
) -> None:
    pairs = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), color=colour, label=label, **style)
