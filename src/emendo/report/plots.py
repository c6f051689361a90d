"""The report's plots, as SVG or PNG bytes, in one style.

Colours are from the Okabe-Ito set, which colour-blind readers can tell apart, and no plot relies on colour alone. Text
and axes are drawn in :data:`INK`, which a page replaces by its own text colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emendo.evaluate.before_after import Row
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.intervals import Interval
from emendo.evaluate.results import Kind, Outcome
from emendo.report.figures import NAMES

Format = Literal["svg", "png"]

INK = "#24313f"
BLUE, SKY, ORANGE, GREEN, RED = "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#d55e00"


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plot; sizes are in inches."""
    figure, (axes,) = panels(width, height, 1)
    return figure, axes


def panels(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure with several plots side by side; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in found:
        calm(axes)
    return figure, found


def calm(axes: Axes) -> None:
    """Remove most lines, draw the rest in :data:`INK`, and put the grid behind the data."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.spines["bottom"].set_alpha(0.35)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)


def legend(axes: Axes, figure: Figure | None = None) -> None:
    """A legend in one line above the plot, over the whole figure's width where the figure is given."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    style: dict[str, Any] = {
        "ncols": len(labels),
        "frameon": False,
        "labelcolor": INK,
        "fontsize": 9,
        "handlelength": 1.6,
        "columnspacing": 1.2,
    }
    if figure is None:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, **style)
    else:
        figure.legend(handles, labels, loc="outside upper left", **style)


def render(figure: Figure, image: Format = "svg") -> bytes:
    """The figure as a file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    if image == "svg":
        with matplotlib.rc_context({"svg.hashsalt": "emendo"}):
            figure.savefig(
                buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": "emendo"}
            )
    else:
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": "emendo"})
    return buffer.getvalue()


_KL_FLOOR = 1e-6
"""The smallest KL that is shown, in nats."""
_SERIES = (
    ("right_after", "teacher_forced", "edit_success", "edit success right after the edit", SKY, "--"),
    ("retained", "teacher_forced", "edit_success", "edit success, asked again", BLUE, "-"),
    ("retained", "free_generation", "edit_success", "edit success, asked again, generated", BLUE, ":"),
    ("retained", "teacher_forced", "generalisation", "generalisation, asked again", GREEN, "-"),
    ("retained", "teacher_forced", "locality", "locality", ORANGE, "-"),
)
"""Time of asking, protocol, score, label, colour, dashes."""
_FLOOR = 1e-8  # smallest probability drawn
_LABEL = 72  # characters of a prompt

_KINDS: Mapping[Kind, tuple[str, str]] = {
    "edit": (BLUE, "o"),
    "paraphrase": (SKY, "s"),
    "neighbour": (ORANGE, "^"),
    "unrelated": (GREEN, "D"),
    "told": (ORANGE, "v"),
    "reversed": (RED, "<"),
    "one_hop": (RED, ">"),
    "two_hop": (RED, "*"),
    "alias": (RED, "p"),
}
_DRAWN: tuple[Kind, ...] = ("edit", "paraphrase", "neighbour", "unrelated")
"""The kinds that the scatter shows."""


def score_bars(scores: Mapping[str, Mapping[str, Interval | None]], image: Format = "svg") -> bytes:
    """A bar with its 95% interval for every score, one colour for each way of measuring.

    Args:
        scores: way of measuring -> score -> interval.
        image: the format.
    """
    names = list(dict.fromkeys(name for group in scores.values() for name, value in group.items() if value))
    figure, axes = axes_of(5.2, 0.9 + 0.5 * max(1, len(names)))
    thick = 0.7 / max(1, len(scores))
    for place, ((label, group), colour) in enumerate(zip(scores.items(), (BLUE, SKY, GREEN), strict=False)):
        shift = (place - (len(scores) - 1) / 2) * thick
        for row, name in enumerate(names):
            value = group.get(name)
            if value is None:
                continue
            at = row + shift
            axes.barh(at, value.mean, thick * 0.82, color=colour, label=label if row == 0 else None)
            axes.plot([value.low, value.high], [at, at], color=INK, lw=1.3, solid_capstyle="butt")
            for end in (value.low, value.high):
                axes.plot([end, end], [at - thick * 0.2, at + thick * 0.2], color=INK, lw=1.3)
            axes.text(
                max(value.high, value.mean) + 0.015,
                at,
                f"{value.mean:.3f}",
                va="center",
                fontsize=9,
                color=INK,
            )
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axes.set(xlim=(0, 1.12), ylim=(len(names) - 0.5, -0.5))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", color=INK, alpha=0.12, lw=0.8)
    legend(axes, figure)
    return render(figure, image)


def target_probabilities(rows: Sequence[Row], image: Format = "svg") -> bytes:
    """For each prompt, the probability of the edit's target before (hollow) and after (filled).

    Args:
        rows: a before/after table.
        image: the format.
    """
    figure, axes = axes_of(10.4, 0.9 + 0.3 * max(1, len(rows)))
    seen: set[Kind] = set()
    for at, row in enumerate(rows):
        colour, marker = _KINDS[row.kind]
        axes.annotate(
            "",
            (row.target_after, at),
            (row.target_before, at),
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 2,
                "alpha": 0.55,
                "shrinkA": 4,
                "shrinkB": 4,
            },
        )
        label = None if row.kind in seen else NAMES[row.kind]
        seen.add(row.kind)
        axes.plot(row.target_before, at, marker, mfc="none", mec=colour, mew=1.5, ms=7, clip_on=False)
        axes.plot(row.target_after, at, marker, mfc=colour, mec=colour, ms=7, label=label, clip_on=False)
    axes.set_yticks(range(len(rows)), [_short(row.prompt) for row in rows], fontsize=8.5, parse_math=False)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("probability of the target: before (hollow) and after (filled)", color=INK)
    axes.grid(axis="x", color=INK, alpha=0.12, lw=0.8)
    legend(axes, figure)
    return render(figure, image)


def answer_scatter(outcomes: Sequence[Outcome], image: Format = "svg") -> bytes:
    """The probability of each prompt's answer after its edit against before, on logarithmic scales.

    At edited prompts and paraphrases the answer is the target, which should rise; at the others it is the stored
    answer, which should stay on the diagonal. Smaller probabilities than 1e-8 are drawn there.

    Args:
        outcomes: of all records.
        image: the format.
    """
    figure, axes = axes_of(5.2, 5.8)
    axes.plot([_FLOOR, 1], [_FLOOR, 1], color=INK, alpha=0.4, lw=1, ls=(0, (4, 3)))
    for kind in reversed(_DRAWN):
        colour, marker = _KINDS[kind]
        points = [(max(o.before, _FLOOR), max(o.after, _FLOOR)) for o in outcomes if o.kind == kind]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, ms=4, mew=0, alpha=0.7, clip_on=False, label=NAMES[kind])
    axes.set(xscale="log", yscale="log", xlim=(_FLOOR / 1.6, 1.6), ylim=(_FLOOR / 1.6, 1.6))
    ticks = [1e-8, 1e-6, 1e-4, 1e-2, 1]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.minorticks_off()
    axes.set_xlabel("probability of the answer before the edit", color=INK)
    axes.set_ylabel("after the edit", color=INK)
    axes.grid(color=INK, alpha=0.1, lw=0.8)
    legend(axes, figure)
    return render(figure, image)


def training_curves(history: Sequence[Mapping[str, Any]], image: Format = "svg") -> bytes:
    """Losses on the left, success, generalisation and locality on the right, over the steps of training.

    Args:
        history: rows with ``step`` and any of ``loss``, ``edit``, ``KL``, ``success``, ``generalisation``,
            ``locality``; names that begin with ``validation`` and a space are drawn as points.
        image: the format.
    """
    figure, (losses, scores) = panels(10.4, 3.4, 2)
    left = {"loss": (BLUE, "-"), "edit": (RED, "--"), "KL": (GREEN, ":")}
    right = {"success": (BLUE, "-"), "generalisation": (SKY, "--"), "locality": (ORANGE, "-.")}
    labels = {"loss": "total", "edit": "edit loss", "KL": "locality KL", "success": "edit success"}
    for axes, series in ((losses, left), (scores, right)):
        for name, (colour, dashes) in series.items():
            x, y = _series(history, name)
            axes.plot(x, y, ls=dashes, color=colour, lw=1.6, label=labels.get(name, name) if x else None)
            x, y = _series(history, f"validation {name}")
            axes.plot(x, y, "o", ms=5, mfc="none", mec=colour, mew=1.4)
        axes.set_xlabel("step", color=INK)
        axes.grid(color=INK, alpha=0.1, lw=0.8)
        legend(axes)
    losses.set_ylabel("nats", color=INK)
    if any(value > 0 for name in left for value in _series(history, name)[1]):
        losses.set_yscale("log")
        losses.minorticks_off()
    scores.set_ylim(-0.03, 1.03)
    if any(key.startswith("validation ") for row in history for key in row):
        scores.plot([], [], "o", ms=5, mfc="none", mec=INK, mew=1.4, label="held out")
        legend(scores)
    return render(figure, image)


def site_norms(norms: Mapping[str, float], image: Format = "svg") -> bytes:
    """The size of an edit at each site, ``||dW|| / ||W||``.

    Args:
        norms: site -> relative norm.
        image: the format.
    """
    figure, axes = axes_of(5.2, 0.7 + 0.26 * max(1, len(norms)))
    top = max([*norms.values(), 1e-12])
    for at, value in enumerate(norms.values()):
        axes.barh(at, value, 0.62, color=BLUE)
        axes.text(value + top * 0.015, at, f"{value:.2%}", va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(norms)), [_short(name) for name in norms], fontsize=8.5, parse_math=False)
    axes.set(xlim=(0, top * 1.14), ylim=(len(norms) - 0.4, -0.6))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=None))
    axes.grid(axis="x", color=INK, alpha=0.12, lw=0.8)
    return render(figure, image)


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have this figure."""
    pairs = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    return [float(x) for x, _ in pairs], [float(y) for _, y in pairs]


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1].rstrip() + "…"


def kl_histogram(evaluation: Evaluation, image: Format = "svg") -> bytes:
    """The distribution of the KL at locality prompts, on a logarithmic scale; the left bar has all below 1e-6.

    Args:
        evaluation: the run.
        image: the format.
    """
    groups = {
        "near neighbours": (ORANGE, _kl(evaluation, "neighbour")),
        "unrelated": (GREEN, _kl(evaluation, "unrelated")),
        "with the fact in context": (SKY, _kl(evaluation, "told")),
    }
    kept = {label: found for label, found in groups.items() if found[1]}
    top = max([0.0, *(max(values) for _, values in kept.values())])
    edges = [math.log10(_KL_FLOOR) + i / 3 for i in range(3 * max(7, math.ceil(top + 6)) + 1)]
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
    return [math.log10(max(value, _KL_FLOOR)) for value in values if math.isfinite(value)]


def perplexity_curve(evaluation: Evaluation, image: Format = "svg") -> bytes:
    """The perplexity of plain text after each edit, in ascending order, and that of the clean model.

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
    clean = evaluation.clean.get("perplexity")
    if clean is not None:
        axes.axhline(clean, color=RED, lw=1.2, ls=(0, (4, 3)), label=f"clean: {clean:.4g}")
    if clean is not None and values and max(values) > 5 * clean:
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
        figures: ``as_dict()`` of a sequential evaluation.
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
        clean = figures["clean"].get("perplexity")
        if clean is not None:
            right.axhline(clean, color=RED, lw=1.2, ls=(0, (4, 3)), label="clean model")
            if max(value for _, value in kept_seen) > 5 * clean:
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
