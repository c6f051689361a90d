"""Trained editors by name: those that ship, those in the hub's cache, and what a file in half precision holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cases import build_lm
from emendo.editors import Editor, editor_class, library
from emendo.errors import StorageError
from emendo.models.lm import LM
from emendo.models.sites import find_sites

FIGURES = {"facts": {"edit_success": 1.0, "generalisation": 0.5, "locality": 0.25}}


@pytest.fixture
def editor(tiny_llama: LM) -> Editor:
    kind = editor_class("mend")
    found = kind(find_sites(tiny_llama.model, "mlp"), kind.Config(rank=4))
    found.bind(tiny_llama)
    found.info = {"model_name": "tiny | llama", "steps": 3, "figures": FIGURES, "limits": ["Only <facts>."]}
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return found.eval()


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def test_half_precision_rounds_the_matrices_alone_and_halves_the_file(editor: Editor, tmp_path: Path) -> None:
    editor.save_pretrained(tmp_path / "full")
    editor.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / "editor.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.75 * sizes[0]
    read = Editor.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in editor.state_dict().items():
        expected = tensor.to(torch.bfloat16).to(tensor) if tensor.dim() > 1 else tensor
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], expected)


def test_an_editor_is_found_by_name_fingerprint_and_folder(
    editor: Editor, shelf: Path, tiny_llama: LM
) -> None:
    assert library.shipped() == () and library.shipped_for(editor.fingerprint) is None
    editor.save_pretrained(shelf / "mend-tiny")
    (shelf / "notes").mkdir()
    (entry,) = library.shipped()
    assert (entry.name, entry.ships, entry.info["figures"]) == ("mend-tiny", True, FIGURES)
    assert library.shipped_for(tiny_llama.fingerprint) == entry
    assert library.shipped_for(build_lm("gpt2").fingerprint) is None
    by_name, by_folder = Editor.from_pretrained("mend-tiny"), Editor.from_pretrained(entry.folder)
    assert by_name.fingerprint == by_folder.fingerprint == tiny_llama.fingerprint


def test_a_folder_of_the_same_name_comes_first(
    editor: Editor, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor.save_pretrained(shelf / "mend-tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mend-tiny").mkdir()
    with pytest.raises(StorageError):
        Editor.from_pretrained("mend-tiny")


def test_the_hubs_cache_is_listed(
    editor: Editor, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert library.cached() == ()
    repo = tmp_path / "hub" / "models--someone--an-editor"
    editor.save_pretrained(tmp_path / "made")
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "made", snapshot)
    other = tmp_path / "hub" / "models--someone--a-model" / "snapshots" / ("1" * 40)
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    (entry,) = library.cached()
    assert (entry.name, entry.ships) == ("someone/an-editor", False)
    assert entry.folder.samefile(snapshot)


def test_it_is_uploaded_with_its_card(
    editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    uploaded: dict[str, bytes] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, *_: object, **__: object) -> None:
            pass

        def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> str:
            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert editor.push_to_hub("someone/an-editor") == "https://hub/someone/an-editor"
    card = uploaded["README.md"].decode()
    assert "base_model: tiny | llama" in card and "# An editor of tiny \\| llama" in card
    assert "| facts | 1.0 | 0.5 | 0.25 |" in card and "&lt;facts&gt;" in card
    assert json.loads(uploaded["editor.json"])["info"]["steps"] == 3


def test_an_editor_of_both_forms_warns_of_neither(editor: Editor, tmp_path: Path, tiny_llama: LM) -> None:
    editor.chat = None
    editor.save_pretrained(tmp_path / "both")
    read = Editor.from_pretrained(tmp_path / "both")
    assert read.chat is None
    read.check(tiny_llama)
    read.check(LM(tiny_llama.model, tiny_llama.tokenizer, chat=bool(tiny_llama.tokenizer.chat_template)))
