"""Every plot is drawn, says what it shows, and is the same file each time."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest

from emendo.report import plots
from evaluate.samples import evaluation, history, rows

OUTCOMES = [outcome for result in evaluation().results for outcome in result.outcomes]
CASES: dict[str, Callable[[Any], bytes]] = {
    "scores": lambda image: plots.score_bars(
        {"teacher forced": evaluation().scores(), "free generation": evaluation().scores("generated")}, image
    ),
    "one way, one score missing": lambda image: plots.score_bars(
        {"teacher forced": {**evaluation().scores(), "generalisation": None}}, image
    ),
    "targets": lambda image: plots.target_probabilities(rows(), image),
    "answers": lambda image: plots.answer_scatter(OUTCOMES, image),
    "training": lambda image: plots.training_curves(history(), image),
    "training without validation": lambda image: plots.training_curves(history()[:2], image),
    "training, one row": lambda image: plots.training_curves([{"step": 1, "loss": 0.0}], image),
    "norms": lambda image: plots.site_norms({"blocks.1.mlp": 0.01, "blocks.2.mlp": 0.0}, image),
    "dollars": lambda image: plots.target_probabilities(rows(r"It costs $\no{$ or so"), image),
}


@pytest.mark.parametrize("case", CASES)
def test_svg(case: str) -> None:
    image = CASES[case]("svg")
    assert ET.fromstring(image).tag.endswith("svg")
    assert plots.INK.encode() in image


def test_equal_figures_are_equal_files() -> None:
    assert CASES["answers"]("svg") == CASES["answers"]("svg")


def test_png() -> None:
    assert CASES["scores"]("png").startswith(b"\x89PNG")


def test_no_state_is_kept() -> None:
    assert "matplotlib.pyplot" not in sys.modules


def test_a_long_prompt_is_cut() -> None:
    assert plots._short("x" * 500).endswith("x…")
    assert len(plots._short("x" * 500)) < 100
