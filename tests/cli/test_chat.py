"""`--chat`: from training to evaluation, what each command reads, and what it says of prompts that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chats import chat_lm
from cli.samples import SHORT, Emendo
from emendo import load
from emendo.editors import read_edit
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.edits import Request
from emendo.ledger.guard import targets_reached
from emendo.models.sites import find_sites

PROMPT = "The capital of Bada is"
CHEAP = ("--no-generated", "--no-damage", "--limit", 2)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    lm = chat_lm(seed=2)
    lm.model.config.max_position_embeddings = 256
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(
    emendo_command: Emendo, instruct: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An editor that was trained on prompts in the template."""
    out = tmp_path_factory.mktemp("runs") / "chat"
    emendo_command("train", "--model", instruct, "--chat", "--data", facts, "--out", out, *SHORT)
    return out


def test_a_run_remembers(emendo_command: Emendo, run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "run.json").read_text())["settings"]["chat"] is True
    assert json.loads((run / "editor" / "editor.json").read_text())["chat"] is True
    out = tmp_path / "edit"
    said = emendo_command("edit", "--editor", run, PROMPT, "Old Town", "--out", out, "--json")
    assert said.json["chat"] is True
    assert not said.err
    assert read_edit(out).origin.chat


def test_edit_and_generate_read_the_template(emendo_command: Emendo, instruct: Path, tmp_path: Path) -> None:
    out, lm = tmp_path / "edit", load(instruct, chat=True)
    options = ("--editor", "ft", "--set", "steps=2", "--model", instruct)
    emendo_command("edit", *options, "--chat", PROMPT, "Old Town", "--out", out)
    edit = read_edit(out)
    for flag, reader in (((), lm), (("--no-chat",), lm.reading(chat=False))):
        shown = emendo_command("generate", "--edit", out, *flag, PROMPT, "--tokens", 6, "--json").json
        assert shown["before"] == reader.generate(PROMPT, 6)
        with edit.applied(reader):
            assert shown["after"] == reader.generate(PROMPT, 6)
    plain = emendo_command("edit", *options, PROMPT, "Old Town", "--json").json
    assert plain["chat"] is False


def test_evaluate_says_how_it_asked(emendo_command: Emendo, run: Path, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    command = ("evaluate", "--editor", run, "--data", facts, *CHEAP, "--json")
    found = emendo_command(*command, "--out", out)
    assert found.json["protocol"]["prompts"] == "a user's turn in the tokenizer's chat template"
    assert "FramingWarning" not in found.err
    assert json.loads((out / "run.json").read_text())["asked"]["chat"] is True
    assert "chat template" in (out / "report.html").read_text()
    assert "chat template" in (out / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default::emendo.errors.FramingWarning")
def test_an_editor_on_prompts_that_it_was_not_trained_on(
    emendo_command: Emendo, run: Path, trained: Path, facts: Path, tmp_path: Path
) -> None:
    command = ("evaluate", "--editor", run, "--no-chat", "--data", facts, *CHEAP, "--json")
    found = emendo_command(*command, "--out", tmp_path / "measured")
    assert found.err.count("Warning: This editor was trained on prompts in the chat template") == 1
    assert found.json["protocol"]["prompts"] == "as they stand"
    run_json = json.loads((tmp_path / "measured" / "run.json").read_text())
    assert "chat" not in run_json["asked"]
    assert " --no-chat" in run_json["command"]
    refused = emendo_command("edit", "--editor", trained, "--chat", PROMPT, "Oslo", code=2).err
    assert "has no chat template" in refused


def test_resuming_with_other_prompts(emendo_command: Emendo, trained: Path) -> None:
    said = emendo_command("train", "--resume", "--chat", "--out", trained, code=2).err
    assert "was started with another chat" in said


@pytest.mark.slow
def test_the_guard_asks_an_edit_as_it_was_made(
    emendo_command: Emendo, instruct: Path, tmp_path: Path
) -> None:
    options = ("--editor", "ft", "--set", "lr=0.01", "--model", instruct)
    emendo_command("edit", *options, "--chat", PROMPT, "Old Town", "--out", tmp_path / "edit")
    emendo_command("apply", tmp_path / "edit", "--ledger", tmp_path / "ledger", "--force")
    assert emendo_command("doctor", "--model", instruct, "--json").json["retention"] == 1
    shown = ("show", 1, "--model", instruct)
    assert "in the tokenizer's chat template" in emendo_command(*shown).out
    assert emendo_command(*shown, "--json").json["edit"]["chat"] is True
    lm, edit = load(instruct), read_edit(tmp_path / "edit")
    asked = ("generate", "--model", instruct, "--json", PROMPT)
    for flag, chat in (((), True), (("--no-chat",), False)):
        said = emendo_command(*asked, *flag).json
        assert said["before"] == lm.reading(chat=chat).generate(PROMPT, 20)
        with edit.applied(lm):
            assert said["after"] == lm.reading(chat=chat).generate(PROMPT, 20)
    with edit.applied(lm):
        assert not targets_reached(lm, [(PROMPT, "Old Town")])[0]
        assert targets_reached(lm.reading(chat=True), [(PROMPT, "Old Town")])[0]


@pytest.mark.slow
def test_edit_and_evaluate_take_another_separator(
    emendo_command: Emendo, model: Path, tmp_path: Path
) -> None:
    """A template that ends in a line break is edited as typed; other texts as --separator says."""
    model = Path(shutil.copytree(model, tmp_path / "own"))
    options = ("--editor", "ft", "--set", "steps=2", "--model", model)
    lm = load(model)
    for number, (prompt, between) in enumerate([("### Response:\n", None), ("Q:", "\\n"), ("Q:", "")]):
        out = tmp_path / str(number)
        more = () if between is None else ("--separator", between)
        emendo_command("edit", *options, *more, prompt, "Old Town", "--out", out)
        request = Request(prompt, "Old Town", {None: None, "\\n": "\n", "": ""}[between])
        expected = FineTuning(find_sites(lm.model), FineTuningConfig(steps=2)).edit(lm, [request])
        found = read_edit(out)
        assert found.origin.requests == (request,)
        for name, delta in found.deltas.items():
            assert torch.equal(delta.dense(), expected.deltas[name].dense())
    emendo_command("apply", tmp_path / "1", "--ledger", tmp_path / "ledger", "--force")
    shown = emendo_command("show", 1, "--model", model, "--ledger", tmp_path / "ledger")
    assert "separator" in shown.out and repr("\n") in shown.out
    (tmp_path / "facts.jsonl").write_text(json.dumps({"prompt": "Q:\n", "target": "Old Town"}) + "\n")
    data = ("--data", tmp_path / "facts.jsonl", "--no-generated", "--no-damage", "--json")
    command = ("evaluate", *options, *data)
    assert emendo_command(*command).json["protocol"]["prompts"] == "as they stand"
    glued = emendo_command(*command, "--separator", "").json["protocol"]["prompts"]
    assert glued == "as they stand, '' before the answer"
