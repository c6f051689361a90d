"""KnowledgeEditor's own objective: the multiplier and the margin by hand, saved, and after a resumed run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cases import records_for
from emendo.editors.ke import KeConfig, KnowledgeEditor
from emendo.editors.objective import Outcome, Weights
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.train import TrainConfig, train
from emendo.train.checkpoint import FILE

SITES = (Site("w", 3, 2, "blocks", 0, attention=False, transposed=False),)
CONSTRAINED = KeConfig(lstm_hidden=4, condition=6, hidden=5, objective="constrained")
OUTCOME = Outcome(loss=1.0, edit_loss=1.0, locality_loss=0.5, success=0.5, generalisation=0.5, locality=0.5)


def test_the_multiplier_climbs_while_the_margin_is_exceeded() -> None:
    editor = KnowledgeEditor(SITES, replace(CONSTRAINED, margin=0.2, margin_end=0.15))
    asked = Weights(c_edit=0.3, prompt_share=0.7)
    assert editor._weights(asked) == Weights(c_edit=1.0, prompt_share=0.7, c_loc=1.0)
    editor.adapt(OUTCOME)  # 1 + 0.1 (0.5 - 0.2)
    assert editor._weights(asked).c_loc == pytest.approx(1.03)
    for success, margin in ((0.9, 0.2), (0.91, 0.16), (1.0, 0.15), (1.0, 0.15)):
        editor.adapt(replace(OUTCOME, success=success), validation=True)
        assert float(editor.margin) == pytest.approx(margin)
    editor.adapt(replace(OUTCOME, locality_loss=0.05))  # 1.03 + 0.1 (0.05 - 0.15)
    assert editor._weights(asked).c_loc == pytest.approx(1.02)
    for _ in range(200):
        editor.adapt(replace(OUTCOME, locality_loss=0.0))
    assert editor._weights(asked).c_loc == 0.0


def test_the_other_objective_takes_the_weights_asked_for() -> None:
    editor, asked = KnowledgeEditor(SITES), Weights(0.3, 0.7, 2.0)
    editor.adapt(OUTCOME)
    assert editor._weights(asked) is asked


def test_multiplier_and_margin_are_saved(tmp_path: Path) -> None:
    editor = KnowledgeEditor(SITES, CONSTRAINED)
    editor.adapt(OUTCOME)
    editor.adapt(replace(OUTCOME, success=1.0), validation=True)
    editor.save_pretrained(tmp_path / "ke")
    loaded = KnowledgeEditor.from_pretrained(tmp_path / "ke")
    assert float(loaded.multiplier) == pytest.approx(1.04)
    assert float(loaded.margin) == pytest.approx(0.08)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The multiplier moves at every step and weighs the next one's losses; the margin shrinks at every validation."""
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("emendo.editors.ke._ENOUGH", -1.0)
    made, sites = records_for(tiny_llama, 8), find_sites(tiny_llama.model, last=1)
    config = TrainConfig(steps=6, batch=2, warmup=0, validate_every=2, validate_on=2)

    def run(folder: str, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        editor = KnowledgeEditor(sites, CONSTRAINED)
        adapt, count = editor.adapt, itertools.count(1)

        def stopping(outcome: Outcome, *, validation: bool = False) -> None:
            adapt(outcome, validation=validation)
            if not validation and next(count) == stop:
                raise KeyboardInterrupt

        editor.adapt = stopping  # type: ignore[method-assign]
        args = (tiny_llama, editor, made[:6], made[6:], replace(config, checkpoint_every=0))
        try:
            train(*args, out=tmp_path / folder, resume=resume)
        except KeyboardInterrupt:
            assert stop
        return load_file(tmp_path / folder / FILE)

    whole = run("whole")
    run("parts", stop=4)
    parts = run("parts", resume=True)
    assert float(whole["editor.multiplier"]) != 1.0
    assert float(whole["editor.margin"]) == pytest.approx(0.1 * 0.8**3)
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
