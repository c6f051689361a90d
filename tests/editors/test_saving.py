"""Trained editors, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cases import records
from damage import Damage, cut, drop_tensor, full_disk, remove, rewrite, without
from emendo.editors import Editor
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.errors import StorageError
from emendo.models.lm import LM
from emendo.models.sites import find_sites

FACTS = [Request(record.prompt, record.target) for record in records(5)]


@pytest.fixture
def mend(tiny_llama: LM) -> Mend:
    """A MEND editor with random weights and statistics."""
    editor = Mend(find_sites(tiny_llama.model), MendConfig(rank=4, alpha=0.02), tiny_llama.fingerprint)
    editor.each(tiny_llama, FACTS)  # in training mode: takes statistics
    for parameter in editor.parameters():
        nn.init.normal_(parameter, std=0.02)
    editor.info = {"episodes": 5, "scores": [0.5, 0.75]}
    return editor.eval()


def test_saved_and_loaded_it_makes_the_same_edits(mend: Mend, tiny_llama: LM, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path / "editor")
    expected = mend.edit(tiny_llama, "The capital of Fosoba is", "Oslo")
    for loaded in (
        Editor.from_pretrained(tmp_path / "editor"),
        Mend.from_pretrained(str(tmp_path / "editor")),
    ):
        assert isinstance(loaded, Mend)
        assert not loaded.training
        assert loaded.sites == mend.sites
        assert loaded.config == mend.config
        assert loaded.fingerprint == tiny_llama.fingerprint
        assert loaded.info == mend.info
        assert loaded.state_dict().keys() == mend.state_dict().keys()
        for name, tensor in mend.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        found = loaded.edit(tiny_llama, "The capital of Fosoba is", "Oslo")
        for name, delta in expected.deltas.items():
            assert torch.equal(found.deltas[name].left, delta.left)
            assert torch.equal(found.deltas[name].right, delta.right)


def test_a_folder_that_holds_something_is_refused(mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path / "editor")
    with pytest.raises(StorageError, match="already holds"):
        mend.save_pretrained(tmp_path / "editor")
    mend.save_pretrained(tmp_path / "editor", overwrite=True)


def test_a_full_disk_leaves_the_previous_editor(
    mend: Mend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend.save_pretrained(tmp_path / "editor")
    alpha = mend.alpha.detach().clone()
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    nn.init.ones_(mend.alpha)
    with pytest.raises(StorageError, match="No space left"):
        mend.save_pretrained(tmp_path / "editor", overwrite=True)
    loaded = Mend.from_pretrained(tmp_path / "editor")
    assert torch.equal(loaded.alpha, alpha)
    assert [file.name for file in tmp_path.iterdir()] == ["editor"]


def head(**changes: Any) -> Damage:
    """Damage what stands beside the tensors."""
    return rewrite("editor.json", lambda value: {**value, **changes})


DAMAGES: dict[str, Damage] = {
    "cut tensors": cut("editor.safetensors"),
    "cut json": cut("editor.json"),
    "no tensors": remove("editor.safetensors"),
    "no json": remove("editor.json"),
    "a tensor is missing": drop_tensor("editor.safetensors", "alpha"),
    "other shapes": head(config={"rank": 3}),
    "newer format": head(format=99),
    "no format": rewrite("editor.json", lambda value: without(value, "format")),
    "a list": rewrite("editor.json", lambda value: [value]),
    "no sites": rewrite("editor.json", lambda value: without(value, "sites")),
    "a site is a text": head(sites=["model.layers.1"]),
    "config is a list": head(config=[1]),
    "no editor": rewrite("editor.json", lambda value: without(value, "editor")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_editor_is_named(mend: Mend, tmp_path: Path, damage: Damage) -> None:
    mend.save_pretrained(tmp_path / "editor")
    damage(tmp_path / "editor")
    with pytest.raises(StorageError) as error:
        Editor.from_pretrained(tmp_path / "editor")
    assert str(tmp_path / "editor") in str(error.value)
