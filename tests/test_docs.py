"""The documentation is true: its Python runs on a tiny model, its commands exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import emendo
from cases import in_slow_suite, records, unchanged
from emendo.cli import app
from emendo.cli._app import COMMANDS
from emendo.data import write_records
from emendo.editors import library
from emendo.editors.mend import Mend
from emendo.models.lm import LM
from emendo.train import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if path.name not in ("log.md", "cli.md")
)
WITH_PYTHON = [page for page in PAGES if "```python" in (ROOT / page).read_text(encoding="utf-8")]
WITH_COMMANDS = [page for page in PAGES if "```bash" in (ROOT / page).read_text(encoding="utf-8")]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with everything that the pages name: edits, trained editors, records."""
    editor = Mend(emendo.find_sites(tiny_llama.model), fingerprint=tiny_llama.fingerprint)
    for run in ("demo", "mine"):
        editor.save_pretrained(tmp_path / "runs" / run / "editor")
    for name, city in (("lyon", "Lyon"), ("oslo", "Oslo"), ("my-edit", "Lyon")):
        editor.edit(tiny_llama, "The capital of France is", city).save_pretrained(tmp_path / name)
    for name in ("facts", "held-out"):
        write_records(records(30), tmp_path / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path))
    monkeypatch.setattr(emendo, "load", lambda name: tiny_llama, raising=False)
    monkeypatch.setattr("emendo.train.TrainConfig", lambda steps: TrainConfig(steps=4, warmup=1))
    for kind in (emendo.Edit, emendo.Editor):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name, **_: name)
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "shipped")
    editor.save_pretrained(tmp_path / "shipped" / "mend-smollm2-135m")
    saved = emendo.Edit.save_pretrained
    monkeypatch.setattr(emendo.Edit, "save_pretrained", lambda self, name: saved(self, name, overwrite=True))
    return tmp_path


@pytest.mark.parametrize(
    "page", in_slow_suite(*WITH_PYTHON, but=("README.md", "docs/edits.md", "docs/memory.md"))
)
def test_the_python_of_a_page_runs(page: str, folder: Path, tiny_llama: LM) -> None:
    editor = emendo.Editor.from_pretrained("runs/mine/editor")
    names: dict[str, object] = {
        "edit": emendo.Edit.from_pretrained("lyon"),
        "other": editor.edit(tiny_llama, "The capital of Italy is", "Rome"),
    }
    with unchanged(tiny_llama.model):
        for code in blocks(page, "python"):
            exec(code, names)


def test_the_edit_of_the_readme_is_saved(folder: Path) -> None:
    names: dict[str, object] = {}
    for code in blocks("README.md", "python"):
        exec(code, names)
    assert isinstance(names["edit"], emendo.Edit)
    assert names["edit"].origin.requests[0].target == "Lyon"


def commands(page: str) -> list[list[str]]:
    """Every ``emendo`` command of the page's shell blocks, as words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words[1:] for words in lines if words[:1] == ["emendo"]]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_can_be_parsed(page: str) -> None:
    program = typer.main.get_command(app)
    for words in commands(page):
        context = program.make_context("emendo", list(words), resilient_parsing=False)
        group, rest = program, [*context._protected_args, *context.args]
        while hasattr(group, "resolve_command"):
            _, group, rest = group.resolve_command(context, rest)
            context = group.make_context("emendo", list(rest), parent=context)  # refuses unknown options
            rest = [*context._protected_args, *context.args]


def test_the_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`emendo ([a-z ]+)`", text))
    assert named == set(COMMANDS)
    assert len(text.splitlines()) <= 120


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), (page, target)


def test_the_record_of_the_docs_is_one(tmp_path: Path) -> None:
    shown = blocks("docs/data.md", "json")[0]
    (tmp_path / "one.jsonl").write_text(json.dumps(json.loads(shown)) + "\n", encoding="utf-8")
    (record,) = emendo.read_records(tmp_path / "one.jsonl", need_paraphrase=True).records
    assert record.paraphrases and record.neighbours and record.unrelated and record.subject
