"""The picture of the norms: its claim on made-up figures, and the whole preset on a tiny task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reproduction.mend_paper import claims, plots, presets, tables
from reproduction.mend_paper.budgets import Choice
from reproduction.mend_paper.cells import Cell, Folder, Result
from reproduction.mend_paper.grid import Column, Grid, Preset
from reproduction.mend_paper.page import page
from reproduction.mend_paper.presets import NORMS, build
from reproduction.mend_paper.runner import Runner

from emendo.editors import editor_class
from emendo.editors.mend import Mend, MendConfig
from emendo.evaluate.intervals import Interval
from emendo.models.sites import find_sites
from mend_paper.tiny import Tiny

COLUMN = Column("completion", "tiny llama", "", "perplexity")
ROWS = ("L2, 1", "L2, 10", "L2, 100")


def result(success: float, locality: float, text: float) -> Result:
    values = {"success": success, "locality_kl": locality, "perplexity_drawdown": text}
    return Result({name: Interval(value, value, value) for name, value in values.items()})


def grid(*points: tuple[float, float, float]) -> Grid:
    """MEND's success, locality KL and rise of the perplexity, then those of the path."""
    rows = ("MEND", *ROWS)
    cells = {(row, "completion"): Cell("tiny", "ft") for row in rows}
    preset = Preset(
        "norms", "", "", (COLUMN,), rows, cells, {}, (claims.degrades("L2", "MEND"),), paths={"L2": ROWS}
    )
    results = dict(zip(cells, ([result(*point)] for point in points), strict=False))
    return Grid(preset, results)


@pytest.mark.parametrize(
    ("points", "holds", "words"),
    [
        ([(0.9, 0.3, 1), (1, 0.5, 3), (0.8, 0.2, 0.5), (0.1, 0, 0)], True, "the best is L2, 10 with 0.800"),
        ([(0.9, 0.3, 1), (1, 0.5, 3), (0.9, 0.3, 1), (0.1, 0, 0)], False, "the best is L2, 10 with 0.900"),
        ([(0.9, 0.3, 1), (1, 0.2, 1.1), (1, 0.4, 0.5), (1, 1, 1)], True, "there is none in success"),
        ([(0.9, 0.3, 1), (1, 0.5, 3), (0.1, 0, 0)], None, "figures are missing"),
        ([], None, "figures are missing"),
    ],
)
def test_whether_a_norm_degrades(points: list[tuple[float, float, float]], holds: bool, words: str) -> None:
    (statement,) = grid(*points).statements()
    assert statement.holds is holds
    assert words in statement.text
    drawn = plots.paths(grid(*points), COLUMN)
    assert (drawn is None) == (not points)


@pytest.mark.slow
def test_the_whole_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of each norm on a tiny model with running text; MEND is read, not trained."""
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
    few = {name: (*own[:3], own[3][:1]) for name, own in NORMS.items()}
    monkeypatch.setattr(presets, "NORMS", few)
    monkeypatch.setattr(presets, "STEPS", 2)
    monkeypatch.setattr(presets, "SHIPPED", str(tmp_path / "mend"))

    class Prose(Tiny):
        def bench(self, name: str) -> object:  # type: ignore[override]
            return super().bench("prose")

    source = Prose()
    lm = source.bench("").lm  # type: ignore[attr-defined]
    torch.manual_seed(0)
    mend = Mend(find_sites(lm.model), MendConfig(rank=2), lm.fingerprint)
    mend.save_pretrained(tmp_path / "mend")
    preset = build("norms", Choice(scale=0.25))
    folder = Folder(tmp_path / "out")
    Runner(folder, source).run(list(preset.cells.values()))
    found = Grid.of(preset, folder.latest())
    assert found.missing() == []
    assert [statement.holds is None for statement in found.statements()] == [False] * len(NORMS)
    mended = found.results["MEND", "completion"][0]
    assert mended.training == {}
    assert mended.note == f"ships as {tmp_path / 'mend'}"
    assert mended.figures["rank"].mean < found.results["FT", "completion"][0].figures["rank"].mean
    assert "L-inf penalty, 100" in tables.markdown([found])
    assert page([found], "command", {}).count("<svg") == 1


def test_each_path_runs_from_loose_to_tight() -> None:
    for editor, settings, varied, values in NORMS.values():
        tighter = sorted(values, reverse=varied == "radius")
        assert list(values) == tighter
        for value in values:
            editor_class(editor).Config(**{**settings, varied: value})
