"""`emendo train` from end to end on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cases import build_lm, records
from cli.samples import BRIEF, SHORT
from emendo import Editor
from emendo.cli._console import Interrupted
from emendo.data import read_records, write_records
from emendo.models import streaming, trunk_cache
from emendo.train import loop
from emendo.train.presets import MODELS

RESULT = {
    "out",
    "editor",
    "model",
    "fingerprint",
    "parameters",
    "records",
    "validation_records",
    "skipped",
    "steps",
    "seconds",
    "stopped",
    "skipped_steps",
    "validation",
    "episodes_per_second",
    "efficiency",
    "processes",
}


def weights(run: Path) -> dict[str, Any]:
    with safe_open(run / "editor" / "editor.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_editor(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((one / "history.json").read_text()) == json.loads((other / "history.json").read_text())


def test_the_folder_of_a_run(trained: Path, model: Path, facts: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "checkpoint.safetensors",
        "editor",
        "history.json",
        "run.json",
    }
    editor = Editor.from_pretrained(trained / "editor")
    assert editor.config.rank == 8 and len(editor.sites) == 6
    assert editor.info["model_name"] == str(model) and editor.info["data"] == str(facts)
    history = json.loads((trained / "history.json").read_text())
    assert [row["step"] for row in history if "validation loss" in row] == [5, 10, 12]
    run = json.loads((trained / "run.json").read_text())
    assert run["settings"]["training"]["steps"] == 12
    assert run["result"]["stopped"] == "finished"


def test_json(emendo_command, model: Path, facts: Path, tmp_path: Path) -> None:
    said = emendo_command(
        "train", "--model", model, "--data", facts, "--out", tmp_path / "run", *BRIEF, "--json"
    )
    assert said.json.keys() == RESULT
    assert said.json["records"] == 24 and said.json["validation_records"] == 6  # a fifth of thirty
    assert said.json["steps"] == 2 and said.json["skipped"] == 0
    assert said.json["validation"].keys() >= {"step", "loss", "success", "generalisation", "locality"}
    assert "Ctrl-C saves and stops" in said.err


def test_for_people(emendo_command, model: Path, facts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = emendo_command("train", "--model", model, "--data", facts, "--out", run, *BRIEF)
    assert "Trained on 24 facts: 2 steps in 0 min" in said.out
    assert "locality" in said.out and f"emendo edit --editor {run}" in said.out


def test_validation_of_its_own_and_a_limit(emendo_command, model: Path, facts: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    write_records(records(40)[30:], held)
    said = emendo_command(
        *("train", "--model", model, "--data", facts, "--validation", held, "--limit", 9),
        *("--out", tmp_path / "run", *SHORT, "--steps", 2, "--json"),
    )
    assert (said.json["records"], said.json["validation_records"]) == (9, 10)


def test_the_built_in_facts_and_plain_text(emendo_command, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("= A heading =\n\nAll of this is one long line of plain text to keep as it is.\n")
    said = emendo_command(
        *("train", "--model", model, "--limit", 20, "--text", text),
        *("--out", tmp_path / "run", *BRIEF, "--validate-on", 5, "--json"),
    )
    assert (said.json["records"], said.json["validation_records"]) == (20, 5)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["training"]["text"] == 1


def test_settings_of_the_editor(emendo_command, model: Path, facts: Path, tmp_path: Path) -> None:
    emendo_command(
        *("train", "--model", model, "--data", facts, "--out", tmp_path / "run", "--steps", 2, "--batch", 2),
        *("--set", "norm=false", "--set", "factors=u", "--set", "alpha=0.01", "--set", "rank=4"),
        *("--sites", "*.down_proj", "--sites", "*.2.*.q_proj", "--dtype", "bfloat16"),
    )
    editor = Editor.from_pretrained(tmp_path / "run" / "editor")
    assert (editor.config.norm, editor.config.factors, editor.config.alpha) == (False, "u", 0.01)
    assert [site.name for site in editor.sites] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.3.mlp.down_proj",
    ]


def test_skip_bad_says_how_many(emendo_command, model: Path, facts: Path, tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    data.write_text(facts.read_text() + '{"prompt": "No target here is"}\n')
    said = emendo_command(
        *(
            "train",
            "--model",
            model,
            "--data",
            data,
            "--out",
            tmp_path / "run",
            *BRIEF,
            "--skip-bad",
            "--json",
        )
    )
    assert said.json["skipped"] == 1
    assert "1 records were left out (1 malformed)" in said.err and "facts.jsonl:31" in said.err


def test_a_folder_that_holds_a_run(emendo_command, model: Path, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("train", "--model", model, "--data", facts, "--out", out, *BRIEF)
    emendo_command(*command)
    (out / "mine.txt").write_text("my own")
    before = weights(out)
    said = emendo_command(*command, "--seed", 1, code=2)
    assert "already holds something" in said.err
    assert "--overwrite" in said.err and "--resume" in said.err
    bad = tmp_path / "bad.jsonl"
    write_records([*records(3), type(records(1)[0])("A prompt", "word " * 300, paraphrases=("A",))], bad)
    refused = ("train", "--model", model, "--data", bad, "--out", out, "--overwrite", *BRIEF)
    assert "context is 256" in emendo_command(*refused, code=2).err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())  # not lost
    emendo_command(*command, "--seed", 1, "--overwrite")
    assert not all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())
    assert (out / "mine.txt").read_text() == "my own"
    assert "one of them" in emendo_command(*command, "--overwrite", "--resume", code=2).err


def test_what_cannot_be_trained_on_leaves_no_folder_behind(
    emendo_command, model: Path, tmp_path: Path
) -> None:
    bad, out = tmp_path / "bad.jsonl", tmp_path / "run"
    write_records([type(records(1)[0])("A prompt", "word " * 300, paraphrases=("A",))], bad)
    emendo_command("train", "--model", model, "--data", bad, "--out", out, *SHORT, code=2)
    assert not out.exists() or not any(out.iterdir())


@pytest.fixture
def stopped(
    emendo_command, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run stopped by Ctrl-C at its seventh step."""
    real, calls = loop.training_step, []

    def step(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", step)
        said = emendo_command("train", "--model", model, "--data", facts, "--out", out, *SHORT, code=130)
    assert "step 7 is saved" in said.err
    assert f"emendo train --out {out} --resume" in said.err
    assert not (out / "editor").exists()
    return out


def test_a_resumed_run_is_the_run_that_was_never_stopped(
    emendo_command, stopped: Path, trained: Path
) -> None:
    said = emendo_command("train", "--resume", "--out", stopped, "--json")
    assert said.json["steps"] == 12 and "Continuing" in said.err
    same_editor(trained, stopped)
    again = emendo_command("train", "--resume", "--out", stopped)
    assert "already finished" in again.err and "12 steps" in again.out


def test_resume_takes_the_same_options_and_no_others(
    emendo_command, stopped: Path, trained: Path, model: Path, facts: Path
) -> None:
    resume = ("train", "--resume", "--out", stopped)
    for option in (["--lr", "0.5"], ["--data", "atlas"], ["--set", "norm=false"], ["--sites", "all"]):
        said = emendo_command(*resume, *option, code=2)
        assert "was started with another" in said.err and "Leave the option out" in said.err
    emendo_command(*resume, "--model", model, "--data", facts, *SHORT)
    same_editor(trained, stopped)


def test_resume_from_another_folder_with_relative_paths(
    emendo_command, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(facts.parent)
    monkeypatch.setattr(loop, "training_step", lambda *_: signal.raise_signal(signal.SIGINT))
    emendo_command("train", "--model", model, "--data", facts.name, "--out", tmp_path / "a", *BRIEF, code=130)
    monkeypatch.undo()
    emendo_command("train", "--resume", "--out", tmp_path / "a")


def test_changed_data_cannot_be_resumed(
    emendo_command, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "facts.jsonl", tmp_path / "run"
    data.write_text(facts.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", lambda *_: signal.raise_signal(signal.SIGINT))
        emendo_command("train", "--model", model, "--data", data, "--out", out, *BRIEF, code=130)
    write_records([*read_records(facts)[:29], records(31)[30]], data)
    assert "are not those" in emendo_command("train", "--resume", "--out", out, code=2).err


@pytest.mark.slow
def test_ctrl_c_before_anything_is_saved(
    emendo_command, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    out = tmp_path / "run"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stop)
        said = emendo_command("train", "--model", model, "--data", facts, "--out", out, *SHORT, code=130)
    assert "nothing to save yet" in said.err and "--resume" in said.err
    emendo_command("train", "--resume", "--out", out)
    same_editor(trained, out)
    with monkeypatch.context() as patch:
        patch.setattr("emendo.cli._loading.load", stop)
        said = emendo_command("train", "--model", model, "--data", facts, "--out", tmp_path / "x", code=130)
    assert "nothing was written" in said.err and not (tmp_path / "x").exists()


def test_interrupted_is_no_error_of_emendo() -> None:
    assert not issubclass(Interrupted, (OSError, ValueError, RuntimeError))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_real_process(
    emendo_command, model: Path, facts: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    out = tmp_path / "run"
    options = ("--steps", "40", "--batch", "4", "--rank", "8", "--last", "2", "--checkpoint-every", "0")
    command = ["train", "--model", str(model), "--data", str(facts), "--out", str(out), *options]
    with subprocess.Popen(
        [sys.executable, "-c", "from emendo.cli import main; main()", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EMENDO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    ) as child:
        try:
            end = time.monotonic() + 150
            while not (out / "checkpoint.safetensors").exists() and child.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            child.send_signal(sent)
            _, said = child.communicate(timeout=150)
        finally:
            child.kill()
    assert child.returncode == 130, said
    assert "Stopped: step" in said and "--resume" in said and "Traceback" not in said
    assert not (out / "editor").exists()
    emendo_command("train", "--resume", "--out", out)
    assert (out / "editor" / "editor.json").exists()


@pytest.mark.slow
def test_the_format_that_is_fastest_here_is_taken_and_named(
    emendo_command, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ("train", "--model", model, "--data", facts, "--out", out, *BRIEF)

    def kept() -> str:
        return json.loads((out / "run.json").read_text())["settings"]["dtype"]

    assert "loaded in" not in emendo_command(*command).err
    assert kept() == "float32"
    monkeypatch.setattr("emendo.cli._loading.fastest_dtype", lambda device: "bfloat16")
    assert "loaded in bfloat16" in emendo_command(*command, "--overwrite").err
    assert kept() == "bfloat16"
    assert "loaded in" not in emendo_command(*command, "--overwrite", "--dtype", "float32").err
    assert kept() == "float32"
    emendo_command(
        "train", "--out", out, "--resume"
    )  # goes on in the run's format, here there is nothing to do
    emendo_command("train", "--out", out, "--resume", "--dtype", "fastest", code=2)
    evaluated = emendo_command(
        *("evaluate", "--editor", out, "--data", facts, "--limit", 3, "--dtype", "fastest", "--json"),
        *("--no-damage", "--no-generated"),
    )
    assert evaluated.json


@pytest.mark.slow
def test_a_preset(emendo_command, tmp_path: Path) -> None:
    lm = build_lm("gpt2", n_layer=6)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    write_records(records(12), tmp_path / "facts.jsonl")
    own = ("--model", tmp_path / "model", "--data", tmp_path / "facts.jsonl", "--out", tmp_path / "run")
    emendo_command("train", "--preset", "mend/distilgpt2", *own, "--steps", 2, "--set", "rank=4")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["sites"] == list(MODELS["distilgpt2"].sites)
    assert settings["editor_settings"]["rank"] == 4 and settings["editor_settings"]["alpha_lr"] == 2
    assert settings["training"]["steps"] == 2 and settings["training"]["lr"] == 5e-5
    said = emendo_command("train", "--resume", "--preset", "mend/gpt2", "--out", tmp_path / "run", code=2)
    assert "was started with another" in said.err
    said = emendo_command("train", "--preset", "mend/bart-base", "--out", tmp_path / "other", code=2)
    assert "--preset mend/bart-base needs --model FOLDER" in said.err
    said = emendo_command(
        "train", "--preset", "mend/gpt2", "--editor", "ke", "--out", tmp_path / "other", code=2
    )
    assert "leave --editor out" in said.err


def test_offloaded_blocks(
    emendo_command, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emendo.train.loop.cache_folder", lambda: tmp_path)  # without text of the model
    text = tmp_path / "text.txt"
    text.write_text("All of this is one long line of plain text to keep as it is.\n")
    asked = ("train", "--model", model, "--data", facts, *BRIEF)
    said = emendo_command(*asked, "--offload", "--out", tmp_path / "without", code=2)
    assert "--text FILE" in said.err
    with pytest.MonkeyPatch.context() as patch:
        read: list[int] = []
        real = streaming.stream
        patch.setattr(
            trunk_cache, "stream", lambda trunk, *rest: read.append(trunk.block) or real(trunk, *rest)
        )
        emendo_command(*asked, "--offload", "--text", text, "--out", tmp_path / "run")
    assert read
    emendo_command(*asked, "--text", text, "--out", tmp_path / "whole")
    first, second = weights(tmp_path / "run"), weights(tmp_path / "whole")
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6)
