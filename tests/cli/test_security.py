"""What SECURITY.md promises: reading a file never runs code, and no command changes a model's weights."""

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
