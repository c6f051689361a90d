"""Edits: attached and taken off, saved and loaded, refused where they do not belong."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import unchanged
from damage import Damage, cut, drop_tensor, full_disk, remove, rewrite, without
from emendo import files
from emendo.edit import Edit, Origin, Request
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.lowrank import LowRank
from emendo.models import LM
from emendo.sites import find_sites

REQUEST = Request("The capital of Fosoba is", "Old Town")


def make_edit(lm: LM, size: float = 0.05) -> Edit:
    """A random edit of rank 2 for this model."""
    deltas = {
        site.name: LowRank(size * torch.randn(site.d_out, 2), torch.randn(2, site.d_in))
        for site in find_sites(lm.model)
    }
    origin = Origin(
        lm.fingerprint, lm.name, "mend", {"rank": 4, "factors": "both"}, (REQUEST,), "2025-01-31T12:00:00"
    )
    return Edit(deltas, origin, {"note": "made by hand"})


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    ids = lm.tokenizer(REQUEST.prompt, return_tensors="pt").input_ids
    found: Tensor = lm.model(ids).logits
    return found


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def lm(request: pytest.FixtureRequest) -> LM:
    chosen: LM = request.getfixturevalue(request.param)
    return chosen


# ----------------------------------------------------------------------------- attached and taken off


def test_applied_for_the_length_of_a_block(lm: LM) -> None:
    edit, before = make_edit(lm), logits(lm)
    merged = LM(copy.deepcopy(lm.model), lm.tokenizer)
    for site in find_sites(lm.model):
        site.weight(merged.model).add_(edit.deltas[site.name].dense())
    with unchanged(lm.model):
        with edit.applied(lm):
            torch.testing.assert_close(logits(lm), logits(merged), rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(lm), before)
        with edit.applied(lm.model):  # the bare model will do
            assert not torch.allclose(logits(lm), before)
    assert torch.equal(logits(lm), before)


def test_taken_off_after_an_exception(lm: LM) -> None:
    def use_and_fail() -> None:
        logits(lm)
        raise ZeroDivisionError

    with unchanged(lm.model):
        with pytest.raises(ZeroDivisionError), make_edit(lm).applied(lm):
            use_and_fail()
        with pytest.raises(ZeroDivisionError), make_edit(lm).attach(lm):
            use_and_fail()


def test_attached_until_detached(lm: LM) -> None:
    edit, before = make_edit(lm), logits(lm)
    with unchanged(lm.model):
        attachment = edit.attach(lm)
        assert not torch.allclose(logits(lm), before)
        attachment.detach()
        assert torch.equal(logits(lm), before)
        attachment.detach()
        assert torch.equal(logits(lm), before)


def test_two_edits_at_once_come_off_in_any_order(lm: LM) -> None:
    before = logits(lm)
    first, second = make_edit(lm), make_edit(lm)
    with second.applied(lm):
        only_second = logits(lm)
    a, b = first.attach(lm), second.attach(lm)
    assert not torch.allclose(logits(lm), only_second)
    a.detach()
    assert torch.equal(logits(lm), only_second)
    b.detach()
    assert torch.equal(logits(lm), before)


def test_another_model_is_refused(tiny_llama: LM, tiny_gpt2: LM) -> None:
    edit = make_edit(tiny_llama)
    for other in (tiny_gpt2, tiny_gpt2.model):
        with unchanged(tiny_gpt2.model), pytest.raises(MismatchError) as error, edit.applied(other):
            pytest.fail("the edit was applied")
        assert tiny_llama.fingerprint in str(error.value)
        assert tiny_gpt2.fingerprint in str(error.value)
        assert "tiny-llama" in str(error.value)


def test_a_model_changed_since_is_refused(lm: LM) -> None:
    edit, changed = make_edit(lm), copy.deepcopy(lm.model)
    site = find_sites(changed)[0]
    site.weight(changed).add_(edit.deltas[site.name].dense())
    with pytest.raises(MismatchError):
        edit.attach(changed)


def test_half_precision_of_the_same_model_is_accepted(lm: LM) -> None:
    half = LM(copy.deepcopy(lm.model).bfloat16(), lm.tokenizer)
    edit = make_edit(lm)
    before = logits(half)
    with unchanged(half.model), edit.applied(half):
        assert logits(half).dtype == torch.bfloat16
        assert not torch.allclose(logits(half), before)
    assert edit.deltas[find_sites(lm.model)[0].name].left.dtype == torch.float32


def test_figures(lm: LM) -> None:
    edit = make_edit(lm)
    assert edit.rank == 2
    for site in find_sites(lm.model):
        expected = edit.deltas[site.name].dense().norm() / site.weight(lm.model).norm()
        assert edit.relative_norms(lm)[site.name] == pytest.approx(float(expected), rel=1e-4)
    assert edit.relative_norms(lm.model) == edit.relative_norms(lm)


def test_an_edit_does_not_change(lm: LM) -> None:
    edit = make_edit(lm)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.deltas = {}  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.origin.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("prompt", "target"), [("", "x"), (" \n", "x"), ("x", ""), ("x", "\t"), (None, "x")])
def test_a_request_needs_a_prompt_and_a_target(prompt: Any, target: Any) -> None:
    with pytest.raises(RequestError, match="prompt is empty" if target == "x" else "target is empty"):
        Request(prompt, target)


# ---------------------------------------------------------------------------------- saved and loaded


def test_saved_and_loaded_it_is_the_same(lm: LM, tmp_path: Path) -> None:
    edit = make_edit(lm)
    edit.save_pretrained(tmp_path / "edit")
    loaded = Edit.from_pretrained(str(tmp_path / "edit"))
    assert loaded.origin == edit.origin
    assert loaded.card == edit.card
    assert list(loaded.deltas) == list(edit.deltas) or set(loaded.deltas) == set(edit.deltas)
    for name, delta in edit.deltas.items():
        assert torch.equal(loaded.deltas[name].left, delta.left)
        assert torch.equal(loaded.deltas[name].right, delta.right)
    with edit.applied(lm):
        expected = logits(lm)
    with loaded.applied(lm):
        assert torch.equal(logits(lm), expected)
    head = json.loads((tmp_path / "edit" / "edit.json").read_text())
    assert head["origin"]["requests"] == [{"prompt": REQUEST.prompt, "target": REQUEST.target}]
    assert head["origin"]["fingerprint"] == lm.fingerprint


def test_a_folder_that_holds_something_is_refused(tiny_llama: LM, tmp_path: Path) -> None:
    first, second = make_edit(tiny_llama), make_edit(tiny_llama)
    first.save_pretrained(tmp_path / "edit")
    with pytest.raises(StorageError, match="already exists"):
        second.save_pretrained(tmp_path / "edit")
    name = find_sites(tiny_llama.model)[0].name
    assert torch.equal(Edit.from_pretrained(tmp_path / "edit").deltas[name].left, first.deltas[name].left)
    second.save_pretrained(tmp_path / "edit", overwrite=True)
    assert torch.equal(Edit.from_pretrained(tmp_path / "edit").deltas[name].left, second.deltas[name].left)


def test_a_full_disk_leaves_the_previous_edit(
    tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_edit(tiny_llama)
    first.save_pretrained(tmp_path / "edit")
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        make_edit(tiny_llama).save_pretrained(tmp_path / "edit", overwrite=True)
    name = find_sites(tiny_llama.model)[0].name
    assert torch.equal(Edit.from_pretrained(tmp_path / "edit").deltas[name].left, first.deltas[name].left)
    assert [file.name for file in tmp_path.iterdir()] == ["edit"]


def origin(**changes: Any) -> Damage:
    """Damage where the edit came from."""
    return rewrite("edit.json", lambda head: {**head, "origin": {**head["origin"], **changes}})


DAMAGES: dict[str, Damage] = {
    "cut tensors": cut("edit.safetensors"),
    "cut json": cut("edit.json"),
    "no tensors": remove("edit.safetensors"),
    "no json": remove("edit.json"),
    "a factor without its other": drop_tensor("edit.safetensors", ".right"),
    "newer format": rewrite("edit.json", lambda head: {**head, "format": 99}),
    "format is a text": rewrite("edit.json", lambda head: {**head, "format": "one"}),
    "a list": rewrite("edit.json", lambda head: [head]),
    "nothing in it": rewrite("edit.json", lambda _: {}),
    "no origin": rewrite("edit.json", lambda head: without(head, "origin")),
    "origin is a text": rewrite("edit.json", lambda head: {**head, "origin": "somewhere"}),
    "requests are numbers": origin(requests=[1]),
    "an unknown field": origin(colour="red"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_edit_is_named(tiny_llama: LM, tmp_path: Path, damage: Damage) -> None:
    make_edit(tiny_llama).save_pretrained(tmp_path / "edit")
    damage(tmp_path / "edit")
    with pytest.raises(StorageError) as error:
        Edit.from_pretrained(tmp_path / "edit")
    assert str(tmp_path / "edit") in str(error.value)
