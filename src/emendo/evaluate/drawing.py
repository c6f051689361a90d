"""How emendo's plots are drawn: one look for all of them, as SVG or PNG bytes.

Colours are from the Okabe-Ito set, which colour-blind readers can tell apart, and no plot relies on colour alone.
Text and axes are drawn in :data:`INK`, so that a page can put its own text colour in its place.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Format = Literal["svg", "png"]

INK = "#24313f"
BLUE, SKY, ORANGE, GREEN, RED = "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#d55e00"


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one plot in it."""
    figure, (axes,) = panels(width, height, 1)
    return figure, axes


def panels(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with plots side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in found:
        calm(axes)
    return figure, found


def calm(axes: Axes) -> None:
    """Few lines, all in the ink's colour, the grid behind the data."""
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
    """The figure as a file; the same figure is the same file."""
    buffer = io.BytesIO()
    if image == "svg":
        with matplotlib.rc_context({"svg.hashsalt": "emendo"}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
