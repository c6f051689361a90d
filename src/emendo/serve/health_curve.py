"""The guard's figures over the last steps of a ledger, as the points of small curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from emendo.ledger import Operation

WIDTH, HEIGHT = 320.0, 96.0
"""Size of a curve, in the units of its picture."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve.

    Attributes:
        title: what it shows.
        points: ``(x, y)`` in a picture of :data:`WIDTH` by :data:`HEIGHT`, ``y`` downwards.
        labels: of each point, as text.
        last: the latest value as text.
        lowest: the value at the lower edge, as text.
        highest: the value at the upper edge, as text.
        limit: ``y`` of the guard's limit; None outside the picture, or where it is not known.
    """

    title: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[str, ...]
    last: str
    lowest: str
    highest: str
    limit: float | None

    @property
    def line(self) -> str:
        """The points as an SVG polyline has them."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


def curves(operations: Iterable[Operation]) -> list[Curve]:
    """The perplexity of plain text and the share of changed probes, after each step that was measured.

    Args:
        operations: steps of a ledger, in any order.
    """
    steps = sorted((step for step in operations if step.health), key=lambda step: step.id)
    found = (
        _curve("Perplexity of plain text, × the base model's", steps, "total_perplexity", 1.0, "{:.3f}"),
        _curve("Probes with another answer than the base model's", steps, "total_changed", 0.0, "{:.1%}"),
    )
    return [curve for curve in found if curve is not None]


def _curve(title: str, steps: list[Operation], name: str, base: float, form: str) -> Curve | None:
    values = [(step.id, value) for step in steps if (value := _number(step.health, name)) is not None]
    if not values:
        return None
    limit = _number((steps[-1].health or {}).get("limits"), name)
    numbers = [value for _, value in values]
    low, high = min(base, *numbers), max(base, *numbers)
    high = max(high, low + 0.02)
    span = max(len(values) - 1, 1)

    def height(value: float) -> float:
        return HEIGHT * (1 - (value - low) / (high - low))

    return Curve(
        title,
        tuple((WIDTH * i / span, height(value)) for i, value in enumerate(numbers)),
        tuple(f"operation {id}: {form.format(value)}" for id, value in values),
        form.format(numbers[-1]),
        form.format(low),
        form.format(high),
        height(limit) if limit is not None and low <= limit <= high else None,
    )


def _number(figures: Any, name: str) -> float | None:
    value = figures.get(name) if isinstance(figures, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
