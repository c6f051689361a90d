"""Appendix A: magnitudes against numpy on one text at a time, the curves of tiny trainings, the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reproduction.mend_paper import appendix_a
from reproduction.mend_paper.appendix_a import (
    BASE,
    VARIANTS,
    curve_table,
    curves,
    figure,
    magnitude_table,
    magnitudes,
)

from cases import build_lm, records
from emendo.editors.gradient import edit_factors
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.report.tables import to_markdown
from emendo.train import TrainConfig
from mend_paper.tiny import SETTINGS, TRAINING, Tiny

CONFIG = TrainConfig(**{**TRAINING, "steps": 10, "validate_every": 10, "text": 0})  # type: ignore[arg-type]


def test_magnitudes_are_those_of_all_rows() -> None:
    lm, facts = build_lm("llama", torch.float64), records(6)
    sites = find_sites(lm.model, last=1)
    found = {(m.site, m.factor): m for m in magnitudes(lm, sites, facts)}
    assert list(found) == [(site.name, factor) for site in sites for factor in ("u", "delta")]
    each = [
        edit_factors(Trunk(lm.model, sites), sites, [text])
        for text in to_texts(lm, [(fact.prompt, fact.target) for fact in facts])
    ]
    for (site, factor), own in found.items():
        rows = np.concatenate([getattr(one[site], factor).numpy() for one in each])
        rows = rows[np.abs(rows).sum(1) > 0]
        deviations = rows.std(0, ddof=1)
        assert own.typical == pytest.approx(np.sqrt((rows**2).mean()))
        assert (own.smallest, own.largest) == pytest.approx((deviations.min(), deviations.max()))
    text = to_markdown(magnitude_table(list(found.values())))
    assert f"{min(m.typical for m in found.values()):.2e} to " in text


@pytest.mark.slow
def test_every_variant_is_trained_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path))
    found = curves(Tiny().bench("tiny"), CONFIG, SETTINGS)
    assert [curve.name for curve in found] == list(VARIANTS)
    assert all(curve.steps == (10,) and curve.last["step"] == 10 for curve in found)
    losses = {curve.name: curve.losses[0] for curve in found}
    assert len({round(losses[name], 9) for name in VARIANTS}) == len(VARIANTS)
    text = to_markdown(curve_table(found))
    assert f"| {BASE} | {losses[BASE]:.3f} |" in text
    drawn = figure(found).decode()
    assert drawn.count("<svg") == 1
    assert drawn == figure(found).decode()


@pytest.mark.slow
def test_the_command_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(appendix_a, "Stored", lambda *_, **__: Tiny())
    monkeypatch.setattr(appendix_a, "VARIANTS", {BASE: VARIANTS[BASE]})
    monkeypatch.setattr(appendix_a, "LEFT", (BASE,))
    monkeypatch.setattr(appendix_a, "RIGHT", (BASE,))
    options = ["--out", str(tmp_path / "out"), "--steps", "10", "--facts", "3"]
    appendix_a.program(options, standalone_mode=False)
    assert "root mean square" in capsys.readouterr().out
    assert "root mean square" in (tmp_path / "out" / "appendix_a.md").read_text()
    assert (tmp_path / "out" / "appendix_a.svg").read_bytes().startswith(b"<?xml")
