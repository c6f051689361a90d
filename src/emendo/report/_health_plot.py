"""A ledger's health over its steps, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emendo.report.plots import BLUE, GREEN, INK, ORANGE, RED, Format, legend, panels, render


def health_plot(
    operations: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]], form: Format
) -> bytes:
    """What the guard and later examinations measured, step by step.

    Args:
        operations: a ledger's, in any order.
        checks: its examinations.
        form: of the picture.

    Returns:
        The picture.
    """
    steps = sorted((step for step in operations if step["health"]), key=lambda step: step["id"])
    at = [step["id"] for step in steps]
    figure, (text, probes, kept) = panels(10.5, 3.2, 3)
    _line(text, at, [step["health"]["total_perplexity"] for step in steps], BLUE, "right after each edit")
    _line(
        probes, at, [100 * step["health"]["total_changed"] for step in steps], BLUE, "right after each edit"
    )
    later = sorted(checks, key=lambda check: (check["operation"], check["id"]))
    where = [check["operation"] for check in later]
    figures = [check["figures"] for check in later]
    _points(text, where, [f["drift"]["perplexity"] for f in figures], ORANGE, "examined")
    _points(probes, where, [100 * f["drift"]["changed"] for f in figures], ORANGE, "examined")
    _points(kept, where, [100 * f["retention"] for f in figures], ORANGE, "examined")
    if where:
        kept.plot(where, [100 * f["retention"] for f in figures], color=GREEN, linewidth=1.2, zorder=1)
    for step in steps:
        if step["forced"]:
            for axes in (text, probes):
                axes.axvline(step["id"], color=RED, linewidth=0.8, alpha=0.5)
    for axes, title in (
        (text, "perplexity of plain text, x the clean model's"),
        (probes, "watched prompts with another answer, %"),
        (kept, "targets that are still the answer, %"),
    ):
        axes.set_title(title, loc="left", fontsize=9, color=INK, pad=18)
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.grid(axis="y", color=INK, alpha=0.12)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.set_xlim(0.5, max([*at, *where, 1]) + 0.5)
    kept.set_ylim(0, 104)
    probes.set_ylim(0, max(5.0, probes.get_ylim()[1]))
    legend(text)
    return render(figure, form)


def _line(axes: Any, at: Sequence[int], values: Sequence[float | None], colour: str, label: str) -> None:
    pairs = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), color=colour, linewidth=1.4, marker=".", label=label)


def _points(axes: Any, at: Sequence[int], values: Sequence[float | None], colour: str, label: str) -> None:
    pairs = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
    if pairs:
        axes.plot(
            *zip(*pairs, strict=True), color=colour, linestyle="none", marker="D", markersize=4, label=label
        )
