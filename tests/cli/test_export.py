"""From an edit to an adapter and back, and to a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.samples import Emendo
from emendo import Edit, load

PROMPT = "The capital of Bada is"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT
def test_an_edit_goes_to_peft_and_comes_back(
    emendo_command: Emendo, edit_folder: Path, model: Path, tmp_path: Path
) -> None:
    adapter, back = tmp_path / "adapter", tmp_path / "back"
    figures = emendo_command("export", edit_folder, "--to", "peft", "--out", adapter, "--json").json
    assert figures["rank"] == Edit.from_pretrained(edit_folder).rank
    assert figures["error"] == 0 and figures["logits_differ_by"] < 1e-4
    assert "Loaded back with PEFT" in (adapter / "README.md").read_text(encoding="utf-8")
    said = emendo_command("export", edit_folder, "--max-rank", 2, "--out", tmp_path / "narrow").out
    assert "rank 2, relative error" in said
    assert "matrices of" in emendo_command("import", adapter, "--model", model, "--out", back).out
    lm = load(model)
    with Edit.from_pretrained(edit_folder).applied(lm):
        expected = lm.top(PROMPT)
    with Edit.from_pretrained(back).applied(lm):
        found = lm.top(PROMPT)
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], rel=1e-4)


def test_a_merged_checkpoint_answers_like_the_edit(
    emendo_command: Emendo, edit_folder: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    figures = emendo_command("export", edit_folder, "--to", "merged", "--out", out, "--json").json
    assert 0 < figures["merge_loss"] < 1e-2
    lm = load(model)
    with Edit.from_pretrained(edit_folder).applied(lm):
        expected = lm.generate(PROMPT, 6)
    assert load(out).generate(PROMPT, 6) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "onnx"), "not one of peft, merged"),
        (("--to", "merged", "--max-rank", 4), "--max-rank belongs to --to peft"),
        (("--max-rank", 0), "must be at least 1"),
    ],
)
def test_what_makes_no_sense(
    emendo_command: Emendo, edit_folder: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    assert words in emendo_command("export", edit_folder, *options, "--out", tmp_path / "x", code=2).err
    assert not (tmp_path / "x").exists()
