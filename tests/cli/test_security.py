"""What SECURITY.md promises of files that may come from anybody.

Its other promises are tested where they are kept: shapes and checksums in tests/edits/test_mutations.py, a model's
``ledger.json`` and passwords in tests/ledger/test_place.py, the size of records, pipes and devices in
tests/data/test_reader.py, what reaches a terminal in tests/cli/test_console.py, cards in tests/edits/test_card.py,
pages in tests/report, and what may be replaced in tests/cli/test_outputs.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.samples import Emendo

EVIL = "import pathlib; pathlib.Path({path!r}).write_text('owned')"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (EVIL.format(path=str(self.path)),)


@pytest.mark.slow
def test_the_code_of_a_model_never_runs(emendo_command: Emendo, model: Path, tmp_path: Path) -> None:
    folder, trace = Path(shutil.copytree(model, tmp_path / "model")), tmp_path / "trace"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(EVIL.format(path=str(trace)))
    done = subprocess.run(
        [sys.executable, "-m", "emendo", "sites", str(folder), "--json"],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("Error: "), done.stderr
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["model", "edit", "editor", "adapter"])
def test_no_pickle_is_read(
    emendo_command: Emendo, model: Path, edit_folder: Path, trained: Path, tmp_path: Path, kind: str
) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    folder = tmp_path / "folder"
    if kind == "model":
        shutil.copytree(model, folder)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(bomb)
        emendo_command("sites", folder, code=2)
    elif kind == "edit":
        shutil.copytree(edit_folder, folder)
        (folder / "edit.safetensors").write_bytes(bomb)
        emendo_command("generate", "--edit", folder, "x", "--model", model, code=2)
    elif kind == "editor":
        shutil.copytree(trained / "editor", folder)
        (folder / "editor.safetensors").write_bytes(bomb)
        emendo_command("edit", "--editor", folder, "x", "y", "--model", model, code=2)
    else:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}'
        )
        (folder / "adapter_model.bin").write_bytes(bomb)
        emendo_command("import", folder, "--model", model, "--out", tmp_path / "out", code=2)
    assert not trace.exists()


def test_the_weights_of_a_model_are_never_changed(
    emendo_command: Emendo, model: Path, edit_folder: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    before = {file.name: file.read_bytes() for file in own.iterdir() if file.is_file()}
    emendo_command("apply", edit_folder, "--model", own, "--force")
    emendo_command("generate", "--model", own, "x")
    emendo_command("undo", "--model", own)
    assert {file.name: file.read_bytes() for file in own.iterdir() if file.is_file()} == before


DEEP = {"lists": ("[", "]"), "objects": ('{"a":', "}")}
PLACES = (
    "records.jsonl",
    "edit/edit.json",
    "editor/editor.json",
    "adapter/adapter_config.json",
    "model/config.json",
)


@pytest.mark.parametrize("depth", [200, 100_000])
@pytest.mark.parametrize("shape", DEEP)
@pytest.mark.parametrize("place", [*PLACES, "model/emendo-ledger/ledger.json"])
def test_values_nested_to_any_depth(
    emendo_command: Emendo, place: str, shape: str, depth: int, model: Path, tmp_path: Path
) -> None:
    """As a whole file, and as a field that nobody knows: one message, or the record without the field."""
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True, parents=True)
    begin, end = DEEP[shape]
    deep = begin * depth + ("1" if shape == "objects" else "") + end * depth
    commands: dict[str, tuple[object, ...]] = {
        "records.jsonl": ("data", file),
        "edit/edit.json": ("generate", "--edit", file.parent, "x"),
        "editor/editor.json": ("edit", "--editor", file.parent, "x", "y"),
        "adapter/adapter_config.json": (
            "import",
            file.parent,
            "--model",
            tmp_path / "model",
            "--out",
            tmp_path / "out",
        ),
        "model/config.json": ("sites", file.parent),
        "model/emendo-ledger/ledger.json": ("log", "--model", tmp_path / "model"),
    }
    file.write_text(deep)
    said = emendo_command(*commands[place], code=2)
    assert said.out == "" and said.err.startswith("Error: ") and len(said.err) < 2_000
    if place == "records.jsonl":
        for record in (
            {"more": "DEEP"},
            {"target": "DEEP"},
            {"paraphrases": "DEEP"},
            {"unrelated": ["DEEP"]},
        ):
            file.write_text(json.dumps({"prompt": "p", "target": "t", **record}).replace('"DEEP"', deep))
            code = 0 if "more" in record and depth < 1_000 else 2
            shown = emendo_command("data", file, code=code).err
            assert code == 0 or shown.startswith("Error: ")
