"""From an edit to an adapter and back, and to a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cli.samples import Emendo
from emendo import Edit, load
from emendo.editors.lora import Lora
from emendo.edits import peft

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


def test_an_adapter_of_llama_cpp(emendo_command: Emendo, edit_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit.gguf"
    figures = emendo_command(
        "export", edit_folder, "--to", "gguf", "--max-rank", 2, "--out", out, "--json"
    ).json
    assert figures["rank"] == 2 and figures["error"] > 0
    assert out.read_bytes().startswith(b"GGUF")
    said = emendo_command("export", edit_folder, "--to", "gguf", "--out", out).out
    assert "Wrote a GGUF adapter of rank" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT
def test_an_imported_adapter_can_be_exported(
    emendo_command: Emendo, edit_folder: Path, model: Path, tmp_path: Path
) -> None:
    emendo_command("export", edit_folder, "--out", tmp_path / "adapter")
    emendo_command("import", tmp_path / "adapter", "--model", model, "--out", tmp_path / "edit")
    found = emendo_command("export", tmp_path / "edit", "--out", tmp_path / "again", "--json").json
    assert found["logits_differ_by"] < 1e-4


def test_a_failed_proof_is_an_error_that_leaves_nothing(
    emendo_command: Emendo, edit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        peft, "_A", ".lora_A_renamed.weight"
    )  # PEFT finds no factors and leaves the model as it is
    said = emendo_command("export", edit_folder, "--out", tmp_path / "adapter", code=2).err
    assert "PEFT does not apply the change of" in said and "--to merged" in said
    assert not any(tmp_path.iterdir())


def test_the_command_to_try_is_quoted_for_the_shell(
    emendo_command: Emendo, trained: Path, tmp_path: Path
) -> None:
    prompt, out = 'The "capital" of $(touch x); `id` is', tmp_path / "an edit's folder"
    said = emendo_command("edit", "--editor", trained, prompt, "Oslo", "--out", out).out
    command = shlex.split(said.partition("Try it: ")[2].strip())
    assert command == ["emendo", "generate", "--edit", str(out), prompt]
    emendo_command(*command[1:])


def test_an_edit_with_nan_is_refused(
    emendo_command: Emendo, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Lora.together
    monkeypatch.setattr(
        Lora,
        "together",
        lambda *args: {name: delta.scale(float("nan")) for name, delta in together(*args).items()},
    )
    said = emendo_command("edit", "--editor", "lora", "--model", model, PROMPT, "Oslo", "--json", code=2)
    assert "NaN or infinite" in said.err and not said.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "onnx"), "not one of peft, merged"),
        (("--to", "merged", "--max-rank", 4), "--max-rank belongs to adapters"),
        (("--max-rank", 0), "must be at least 1"),
    ],
)
def test_what_makes_no_sense(
    emendo_command: Emendo, edit_folder: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    assert words in emendo_command("export", edit_folder, *options, "--out", tmp_path / "x", code=2).err
    assert not (tmp_path / "x").exists()
