"""The README's Python runs as it stands, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import emendo
from cases import unchanged
from emendo.editors.mend import Mend
from emendo.models.lm import LM

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


@pytest.mark.parametrize("page", ["edits", "ledger"])
def test_the_python_of_a_page_runs(
    page: str, tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (README.parent / f"docs/{page}.md").read_text(), re.DOTALL)
    editor = Mend(emendo.find_sites(tiny_llama.model), fingerprint=tiny_llama.fingerprint)
    edit, other = (editor.edit(tiny_llama, "The capital of France is", city) for city in ("Lyon", "Paris"))
    edit.save_pretrained(tmp_path / "my-edit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path))
    monkeypatch.setattr(emendo, "load", lambda name: tiny_llama, raising=False)
    monkeypatch.setattr(emendo.Edit, "push_to_hub", lambda self, name: name)
    with unchanged(tiny_llama.model):
        exec(code, {"edit": edit, "other": other})


def test_the_commands_of_the_readme_exist() -> None:
    from emendo.cli import app

    named = set(re.findall(r"`emendo ([a-z ]+)`", README.read_text(encoding="utf-8")))
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
