"""The README's Python runs as it stands, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import emendo
from emendo.editors.mend import Mend
from emendo.models import LM

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(
    tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    sites = emendo.find_sites(tiny_llama.model)
    Mend(sites, fingerprint=tiny_llama.fingerprint).save_pretrained(tmp_path / "runs/demo/editor")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emendo, "load", lambda name: tiny_llama, raising=False)
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["edit"], emendo.Edit)
    assert names["edit"].origin.requests[0].target == "Lyon"
    assert (tmp_path / "lyon" / "edit.safetensors").exists()


def test_the_commands_of_the_readme_exist() -> None:
    from emendo.cli import app

    named = set(re.findall(r"`emendo ([a-z]+)`", README.read_text(encoding="utf-8")))
    assert named == {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_record_of_the_docs_is_one(tmp_path: Path) -> None:
    page = (README.parent / "docs" / "data.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "one.jsonl").write_text(json.dumps(json.loads(shown)) + "\n", encoding="utf-8")
    (record,) = emendo.read_records(tmp_path / "one.jsonl", need_paraphrase=True)
    assert (record.target, record.neighbours[0].answer, record.unrelated[0].answer) == (
        "Canberra",
        "Berlin",
        "O",
    )
