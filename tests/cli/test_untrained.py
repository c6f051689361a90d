"""Commands with methods that need no training, for every kind of model, from the edit to its use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cases import build_lm, in_slow_suite, records_for
from cli.samples import Emendo
from emendo import Edit, load
from emendo.cli._options import TRAINED, UNTRAINED
from emendo.data import read_records, write_records
from emendo.editors import EDITORS, editor_class, read_edit
from emendo.editors.cache import Cache, CacheConfig, CacheEdit
from emendo.evaluate import evaluate

PROMPT = "The capital of Bada is"
CHEAP = (
    dict.fromkeys(
        (
            "ft",
            "ft-kl",
            "ft-constrained",
            "ft-penalised",
            "diff-pruning",
            "ewc",
            "lora",
            "memit",
            "alphaedit",
        ),
        "steps=2",
    )
    | dict.fromkeys(("locft", "crisp"), "epochs=2")
    | {"ultraedit": "eta=1e-3", "joint-rome": "epochs=2"}
)

LIKE_FT = (
    "ft-kl",
    "ft-constrained",
    "ft-penalised",
    "diff-pruning",
    "ewc",
    "locft",
    "crisp",
    "joint-rome",
    "memit",
    "alphaedit",
    "repair",
    "k-adapter",
    "lora",
)
"""Methods whose way through the commands is that of ft."""


def settings(name: str) -> tuple[str, ...]:
    return ("--set", CHEAP[name]) if name in CHEAP else ()


def test_the_methods_that_the_help_lists() -> None:
    assert (*TRAINED, *UNTRAINED) == tuple(EDITORS)
    for name in EDITORS:
        assert editor_class(name).needs_training == (name in TRAINED), name


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_FT else []) for name in UNTRAINED],
)
def test_from_the_edit_to_its_use(emendo_command: Emendo, model: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "edit"
    command = ("edit", "--editor", name, "--model", model, *settings(name), PROMPT, "Oslo")
    said = emendo_command(*command, "--neighbour", "The capital of Gude is", "--out", out).out
    assert "P(Oslo)" in said and f"Saved in {out}" in said
    weights = not editor_class(name).no_changes
    assert ("||dW||/||W||" in said) == weights
    edit, lm = read_edit(out), load(model)
    assert isinstance(edit, Edit) == weights
    assert edit.origin.editor == name
    assert (edit.card["rank"] > 0) == weights
    if name == "in-context":  # a random model does not follow what it reads
        assert edit.card["target_after"] != edit.card["target_before"]
    else:
        assert edit.card["target_after"] > edit.card["target_before"]
    shown = emendo_command("generate", "--edit", out, PROMPT, "--tokens", 4, "--json").json
    assert shown["before"] == lm.generate(PROMPT, 4)
    with edit.applied(lm) as edited:
        assert shown["after"] == edited.generate(PROMPT, 4)


@pytest.mark.parametrize("name", ["rome", *in_slow_suite("ft", "cache", "in-context")])
def test_evaluate(emendo_command: Emendo, model: Path, facts: Path, name: str) -> None:
    command = (
        "evaluate",
        "--editor",
        name,
        "--model",
        model,
        "--data",
        facts,
        "--limit",
        2,
        "--no-generated",
    )
    said = emendo_command(*command, *settings(name), "--json").json
    assert said["protocol"]["editor"] == name
    assert (said["rank"] == 0) == bool(editor_class(name).no_changes)


@pytest.mark.slow
def test_settings_reach_the_method(emendo_command: Emendo, model: Path, facts: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    options = ("--editor", "cache", "--model", model, "--set", "radius=1e9", "--set", "lookup=prompt")
    rest = ("--data", facts, "--limit", 3, "--report", page, "--json")
    said = emendo_command("evaluate", *options, *rest).json
    direct = evaluate(load(model), Cache((), CacheConfig(radius=1e9)), read_records(facts), limit=3)
    expected = json.loads(json.dumps(direct.as_dict()))
    assert said["teacher_forced"] == expected["teacher_forced"]
    assert said["generated"] == expected["generated"]
    assert said["teacher_forced"]["generalisation"]["mean"] == 1
    assert "emendo evaluate --editor cache" in (html := page.read_text(encoding="utf-8"))
    assert "--set radius=1e9 --set lookup=prompt" in html
    out = tmp_path / "edit"
    sites = ("--editor", "ft", "--model", model, "--set", "steps=1", "--sites", "*.down_proj", "--last", "1")
    emendo_command("edit", *sites, PROMPT, "Oslo", "--out", out)
    assert list(Edit.from_pretrained(out).deltas) == ["model.layers.3.mlp.down_proj"]


def _folder(kind: str, path: Path) -> Path:
    lm = build_lm(kind)
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    write_records(records_for(lm, 2), path / "facts.jsonl")
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t5", "ft"),
        pytest.param("t5", "in-context", marks=pytest.mark.slow),
        pytest.param("bert", "ft", marks=pytest.mark.slow),
        ("bert", "cache"),
    ],
)
def test_other_kinds_of_models(emendo_command: Emendo, tmp_path: Path, kind: str, name: str) -> None:
    folder = _folder(kind, tmp_path / kind)
    target = "Supported" if kind == "bert" else "Oslo"
    command = ("--editor", name, "--model", folder, *settings(name))
    said = emendo_command("edit", *command, PROMPT, target, "--out", tmp_path / "edit", "--json").json
    assert said["target_after"] > said["target_before"]
    shown = emendo_command("generate", "--edit", tmp_path / "edit", PROMPT, "--json").json
    with read_edit(tmp_path / "edit").applied(load(folder)) as edited:
        assert shown["after"] == edited.generate(PROMPT)
    data = ("--data", folder / "facts.jsonl", "--limit", 2)
    assert emendo_command("evaluate", *command, *data, "--json").json["records"] == 2


WRONG: list[tuple[tuple[Any, ...], str]] = [
    (
        ("--editor", "mend"),
        "The mend editor must be trained first: emendo train --editor mend --model MODEL --out",
    ),
    (("--editor", "enn"), "give its folder: --editor runs/enn"),
    (
        ("--editor", "cache", "--sites", "all"),
        "--sites and --last choose weight matrices, but cache changes no weights",
    ),
    (("--editor", "in-context", "--last", 1), "but in-context changes no weights"),
    (("--editor", "ft", "--set", "lr=fast"), "--set lr=fast: 'fast' is not a number or none."),
    (("--editor", "ft", "--set", "speed=1"), "There are: steps (a whole number); lr (a number or none); "),
    (("--editor", "in-context", "--set", "text=x"), "There are: template (a text)."),
    (("--editor", "cache", "--set", "radios=2"), "no setting 'radios'; did you mean 'radius'?"),
    (("--editor", "cache", "--set", "radius=-2"), "radius must be at least 0, not -2.0"),
    (("--editor", "in-context", "--set", "template=so"), "must hold {prompt} and {target}"),
    (("--editor", "ft", "--sites", "*.nothing"), "No weight matrix matches"),
    (("--editor", "memory"), "memory holds no editor"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(map(str, case[0])) for case in WRONG])
def test_what_cannot_be_done(
    emendo_command: Emendo, model: Path, facts: Path, options: tuple[Any, ...], message: str
) -> None:
    wanted = message.replace("MODEL", str(model))
    for command in (("edit", PROMPT, "Oslo"), ("evaluate", "--data", facts)):
        said = emendo_command(*command, *options, "--model", model, code=2)
        assert said.err.startswith("Error: ") and wanted in said.err


def test_settings_of_a_trained_editor(emendo_command: Emendo, trained: Path) -> None:
    for option in (("--set", "rank=2"), ("--sites", "all"), ("--last", "1")):
        said = emendo_command("edit", "--editor", trained, *option, PROMPT, "Oslo", code=2)
        assert f"the editor in {trained} has its own" in said.err


def test_a_folder_with_a_methods_name(
    emendo_command: Emendo, trained: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is taken for an editor only where it holds one, or a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "in-context").symlink_to(trained)
    for name, kind in (("cache", CacheEdit), ("in-context", Edit)):
        emendo_command("edit", "--editor", name, "--model", model, PROMPT, "Oslo", "--out", f"{name}-edit")
        assert type(read_edit(tmp_path / f"{name}-edit")) is kind


@pytest.mark.slow
def test_an_edit_of_a_model_that_was_trained_itself(
    emendo_command: Emendo, model: Path, facts: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "edit"
    short = ("--steps", 3, "--batch", 2, "--validate-on", 2, "--last", 1)
    emendo_command("train", "--editor", "enn", "--model", model, "--data", facts, "--out", run, *short)
    said = emendo_command("edit", "--editor", run, PROMPT, "Oslo", "--out", out).out
    assert f"emendo generate --edit {out} --editor {run}" in said.replace("\n", " ")
    refused = emendo_command("generate", "--edit", out, PROMPT, code=2)
    assert "This edit was made for" in refused.err
    shown = emendo_command("generate", "--edit", out, "--editor", run, PROMPT, "--json").json
    assert shown["before"] == load(model).generate(PROMPT)
    data = ("--data", facts, "--limit", 1, "--no-generated")
    assert emendo_command("evaluate", "--editor", run, *data, "--json").json["rank"] > 0
