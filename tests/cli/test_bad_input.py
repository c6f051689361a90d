"""Every wrong input gets one clear message and exit code 2; nothing is written, nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases import records
from cli.samples import SHORT, Emendo
from damage import cut, full_disk, remove
from emendo.data import Record, write_records

PROMPT = "The capital of Bada is"


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ("", "Oslo", "The prompt is empty"),
        (" \n", "Oslo", "The prompt is empty"),
        (PROMPT, "", "The target is empty"),
        (PROMPT, "  ", "The target is empty"),
        (PROMPT, "very " * 400 + "long", "the model's context is 256: shorten the prompt"),
    ],
)
def test_texts_of_an_edit(
    emendo_command: Emendo, trained: Path, tmp_path: Path, prompt: str, target: str, message: str
) -> None:
    out = tmp_path / "edit"
    said = emendo_command("edit", "--editor", trained, prompt, target, "--out", out, code=2)
    assert said.err.startswith("Error: ") and message in said.err and said.out == ""
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_to_generate_from(emendo_command: Emendo, edit_folder: Path) -> None:
    assert "The prompt is empty" in emendo_command("generate", "--edit", edit_folder, " ", code=2).err


def _bare(path: Path) -> None:
    write_records([Record("The capital of Bada is", "Oslo")], path)


FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda path: None, "does not exist"),
    ("empty", lambda path: path.write_text(""), "is empty"),
    (
        "not JSON",
        lambda path: path.write_text("capital: Oslo\n"),
        "data.jsonl:1: expected a line with one JSON object",
    ),
    (
        "no target",
        lambda path: path.write_text('{"prompt": "Bada is", "paraphrases": ["x"]}\n'),
        "field 'target': expected a non-empty text, found nothing",
    ),
    ("no paraphrase", _bare, "field 'paraphrases': expected at least one paraphrase, found none"),
    ("unknown layout", lambda path: path.write_text('{"question": "?"}\n'), "known layout"),
    ("not text", lambda path: path.write_bytes(b"\xff\xfe\x00"), "not a UTF-8 text file"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_record_files(
    emendo_command: Emendo, model: Path, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    data = tmp_path / "data.jsonl"
    make(data)
    said = emendo_command(
        "train", "--model", model, "--data", data, "--out", tmp_path / "run", *SHORT, code=2
    )
    assert message in said.err
    assert not (tmp_path / "run").exists()


def test_a_record_file_to_evaluate_on(emendo_command: Emendo, trained: Path, tmp_path: Path) -> None:
    command = ("evaluate", "--editor", trained, "--data", tmp_path / "none.jsonl")
    assert "does not exist" in emendo_command(*command, code=2).err


TRAIN: list[tuple[list[str], str]] = [
    (["--editor", "mand"], "There is no editor 'mand'; there are: mend"),
    (["--set", "nrom=false"], "no setting 'nrom'; did you mean 'norm'? There are: rank (a whole number); "),
    (["--set", "norm"], "a setting is KEY=VALUE"),
    (["--set", "norm=perhaps"], "'perhaps' is not true or false"),
    (["--set", "rank=many"], "'many' is not a whole number"),
    (["--set", "factors=v"], "'v' is not one of both, u, delta, smaller"),
    (["--set", "rank=0"], "rank must be at least 1, not 0"),
    (
        ["--sites", "*.nothing"],
        "No weight matrix matches ['*.nothing']. The last block has: model.layers.3.mlp.down",
    ),
    (["--sites", "mlp", "--sites", "*.q_proj"], "--sites mlp cannot be combined"),
    (["--last", "0"], "must be at least 1"),
    (["--lr", "0"], "--lr must be above 0"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--minutes", "-1"], "--minutes must be above 0"),
    (["--limit", "0"], "--limit must be at least 1"),
    (["--text", "/none.txt"], "--text /none.txt cannot be read"),
    (["--dtype", "int4"], "dtype 'int4' is not one of float32, bfloat16, float16"),
    (["--device", "toaster"], "device 'toaster' cannot be used"),
    (["--validation", "/none.jsonl"], "/none.jsonl does not exist"),
    (["--model", "no-such-model-anywhere"], "Cannot load the model 'no-such-model-anywhere'"),
]


@pytest.mark.parametrize(("option", "message"), TRAIN, ids=[" ".join(option) for option, _ in TRAIN])
def test_options_of_a_run(
    emendo_command: Emendo, model: Path, facts: Path, tmp_path: Path, option: list[str], message: str
) -> None:
    command = ("train", "--model", model, "--data", facts, "--out", tmp_path / "run", "--steps", 2)
    said = emendo_command(*command, *option, code=2)
    assert said.err.startswith("Error: ") and message in said.err, said.err
    assert not (tmp_path / "run").exists()


def test_a_model_without_blocks(emendo_command: Emendo, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "config.json").write_text('{"model_type": "no-such-type"}')
    assert "Cannot load the model" in emendo_command("sites", broken, code=2).err


def test_an_editor_of_another_model(
    emendo_command: Emendo, trained: Path, other_model: Path, facts: Path, tmp_path: Path
) -> None:
    for command in (
        ("edit", PROMPT, "Oslo", "--out", tmp_path / "edit"),
        ("evaluate", "--data", facts),
    ):
        said = emendo_command(*command, "--editor", trained, "--model", other_model, code=2)
        assert "trained for a model with fingerprint" in said.err and "emendo train" in said.err
    assert not (tmp_path / "edit").exists()


def test_an_edit_of_another_model(emendo_command: Emendo, edit_folder: Path, other_model: Path) -> None:
    said = emendo_command("generate", "--edit", edit_folder, "--model", other_model, PROMPT, code=2)
    assert "Load the model that the edit was made for" in said.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("edit.safetensors"), "edit.safetensors is damaged"),
        (remove("edit.safetensors"), "edit.safetensors does not exist"),
        (cut("edit.json"), "edit.json is damaged"),
        (remove("edit.json"), "edit.json does not exist"),
    ],
)
def test_a_damaged_edit(
    emendo_command: Emendo, edit_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(edit_folder, tmp_path / "edit")
    damage(tmp_path / "edit")
    assert message in emendo_command("generate", "--edit", tmp_path / "edit", PROMPT, code=2).err


def test_a_damaged_editor_and_none_at_all(emendo_command: Emendo, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    command = ("edit", "--editor", tmp_path / "run", PROMPT, "Oslo")
    cut("editor.safetensors")(tmp_path / "run" / "editor")
    assert "editor.safetensors is damaged" in emendo_command(*command, code=2).err
    shutil.rmtree(tmp_path / "run" / "editor")
    assert "has not finished" in emendo_command(*command, code=2).err
    said = emendo_command("edit", "--editor", tmp_path / "nowhere", PROMPT, "Oslo", code=2)
    assert "holds no editor" in said.err


def test_what_cannot_be_resumed(emendo_command: Emendo, trained: Path, tmp_path: Path) -> None:
    resume = ("train", "--resume", "--out", tmp_path / "run")
    assert "holds no training run" in emendo_command(*resume, code=2).err
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "editor")
    cut("checkpoint.safetensors")(tmp_path / "run")
    assert "damaged and cannot be resumed" in emendo_command(*resume, code=2).err
    cut("run.json")(tmp_path / "run")
    assert "run.json is damaged" in emendo_command(*resume, code=2).err


def test_a_folder_that_holds_something_else(emendo_command: Emendo, facts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    for command in (["train", "--data", str(facts), "--overwrite"], ["demo"]):
        said = emendo_command(*command, "--model", "never-loaded", "--out", tmp_path, code=2)
        assert "not emendo's" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk(
    emendo_command: Emendo,
    model: Path,
    facts: Path,
    tmp_path: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        said = emendo_command("train", "--model", model, "--data", facts, "--out", out, *SHORT, code=2)
    assert "No space left on device" in said.err
    assert not (out / "editor").exists()
    emendo_command("train", "--resume", "--out", out)  # once there is room again
    assert (out / "editor" / "editor.safetensors").read_bytes() == (
        trained / "editor" / "editor.safetensors"
    ).read_bytes()


def test_debug_shows_where(emendo_command: Emendo, tmp_path: Path) -> None:
    command = ("edit", "--editor", tmp_path / "nowhere", PROMPT, "Oslo")
    said = emendo_command("--debug", *command, code=2)
    assert (
        "Traceback" in said.err
        and "emendo.errors.StorageError: " in said.err
        and "holds no editor" in said.err
    )
    said = emendo_command(*command, code=2)
    assert "Traceback" not in said.err and said.err.startswith("Error: ") and "holds no editor" in said.err


def test_brackets_in_messages_are_not_markup(emendo_command: Emendo, tmp_path: Path) -> None:
    said = emendo_command("evaluate", "--editor", tmp_path / "[red]x[/red]", code=2)
    assert "[red]x[/red]" in said.err


def test_records_that_are_too_few_for_validation(emendo_command: Emendo, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    write_records(records(4), data)
    command = ("train", "--model", model, "--data", data, "--out", tmp_path / "run", *SHORT, "--json")
    said = emendo_command(*command).json
    assert (said["records"], said["validation_records"], said["validation"]) == (4, 0, {})
