"""Trained editors, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import records
from damage import Damage, cut, drop_tensor, full_disk, remove, rewrite, without
from emendo.editors import Editor, base
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Edit, Request
from emendo.errors import EmendoError, MismatchError, StorageError
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


def test_overwritten_bytes_are_noticed(mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path / "editor")
    file = tmp_path / "editor" / "editor.safetensors"
    data = bytearray(file.read_bytes())
    data[-40:-20] = b"\xff" * 20  # NaN in float32
    file.write_bytes(data)
    with pytest.raises(StorageError, match="does not match its checksum"):
        Editor.from_pretrained(tmp_path / "editor")


def sealed(folder: Path, head: Any, *, old: bool = False) -> None:
    """Write a head with the checksum that belongs to it, or as an old editor without one."""
    checksum = {} if old else {"checksum": base._checksum(head, folder / "editor.safetensors")}
    (folder / "editor.json").write_text(json.dumps({**head, **checksum}))


def test_an_editor_without_a_checksum_still_loads(mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path / "editor")
    head = without(json.loads((tmp_path / "editor" / "editor.json").read_text()), "checksum")
    sealed(tmp_path / "editor", {**head, "format": 1}, old=True)
    assert Editor.from_pretrained(tmp_path / "editor").sites == mend.sites
    sealed(tmp_path / "editor", head, old=True)
    with pytest.raises(StorageError, match="checksum"):
        Editor.from_pretrained(tmp_path / "editor")


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown setting": ({"config": {"width": 3}}, "width"),
    "a setting of another type": ({"config": {"rank": "4"}}, "rank must be a whole number, not '4'"),
    "a setting out of bounds": ({"config": {"rank": 0}}, "rank must be at least 1"),
    "a setting that would need much memory": ({"config": {"rank": 10**9}}, "does not fit the settings"),
    "more blocks": ({"config": {"rank": 4, "blocks": 3}}, "does not fit the settings"),
    "an unknown method": ({"editor": "bend"}, "no editor 'bend'"),
    "a method that is a list": ({"editor": []}, "unhashable"),
    "a fingerprint that is a number": ({"fingerprint": 5}, "fingerprint"),
    "no text of NaN": ({"config": {"alpha": float("nan")}}, "alpha"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_content_is_refused(mend: Mend, tmp_path: Path, changes: Any, words: str) -> None:
    mend.save_pretrained(tmp_path / "editor")
    head = without(json.loads((tmp_path / "editor" / "editor.json").read_text()), "checksum")
    sealed(tmp_path / "editor", {**head, **changes})
    with pytest.raises(StorageError, match=words):
        Editor.from_pretrained(tmp_path / "editor")


def test_numbers_that_are_not_finite_are_refused(mend: Mend, tmp_path: Path) -> None:
    nn.init.constant_(mend.alpha, float("nan"))
    mend.save_pretrained(tmp_path / "editor")
    with pytest.raises(StorageError, match="alpha has values that are not finite"):
        Editor.from_pretrained(tmp_path / "editor")


def test_sites_that_the_model_lacks_are_refused(mend: Mend, tiny_llama: LM, tmp_path: Path) -> None:
    mend.sites = (replace(mend.sites[0], name="model.layers.9.mlp.up_proj"), *mend.sites[1:])
    mend.save_pretrained(tmp_path / "editor")
    with pytest.raises(MismatchError, match=r"layers\.9.*has no such matrix"):
        Editor.from_pretrained(tmp_path / "editor").edit(tiny_llama, "The capital of Fosoba is", "Oslo")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**6, 2**63, 10**30, 0.5, 1e308, "", "both", "mend", "ke", "x" * 300, [], {}, [1]]),
)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[list[int], Any]]:
    """Places in a tree of JSON values, each with what is put there; None as the value removes it."""
    places = st.lists(st.integers(0, 9), min_size=1, max_size=3)
    return draw(st.lists(st.tuples(places, VALUES), min_size=1, max_size=3))


def mutated(value: Any, place: list[int], new: Any) -> Any:
    """The value with something else at a place."""
    if not place or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[place[0] % len(keys)]
    changed = value.copy()
    if len(place) == 1 and new is None:
        del changed[key]
    else:
        changed[key] = mutated(value[key], place[1:], new)
    return changed


@pytest.mark.filterwarnings("ignore::emendo.errors.FramingWarning")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_a_mutated_editor_edits_or_is_refused(
    changes: list[tuple[list[int], Any]], mend: Mend, tiny_llama: LM, tmp_path: Path
) -> None:
    folder = tmp_path / "editor"
    if not folder.exists():
        mend.save_pretrained(folder)
        (tmp_path / "head.json").write_bytes((folder / "editor.json").read_bytes())
    head = without(json.loads((tmp_path / "head.json").read_text()), "checksum")
    for place, new in changes:
        head = mutated(head, place, new)
    if isinstance(head, dict):
        sealed(folder, head)
    else:
        (folder / "editor.json").write_text(json.dumps(head))
    try:
        edit = Editor.from_pretrained(folder).edit(tiny_llama, FACTS[0].prompt, FACTS[0].target)
        assert isinstance(edit, Edit)
        assert all(delta.dense().isfinite().all() for delta in edit.deltas.values())
    except EmendoError:
        pass
