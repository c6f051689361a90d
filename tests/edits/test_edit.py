"""Edits: attached and taken off, saved and loaded, refused where they do not belong."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from cases import unchanged
from damage import Damage, cut, drop_tensor, full_disk, remove, rewrite, without
from emendo.editors import read_edit
from emendo.edits.edit import Edit, Origin, Request, compose, diff
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites

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
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
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


def test_one_bit_is_enough(tiny_llama: LM, tmp_path: Path) -> None:
    make_edit(tiny_llama).save_pretrained(tmp_path / "edit")
    file = tmp_path / "edit" / "edit.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match="checksum"):
        Edit.from_pretrained(tmp_path / "edit")


def test_a_changed_request_does_not_fit_the_checksum(tiny_llama: LM, tmp_path: Path) -> None:
    make_edit(tiny_llama).save_pretrained(tmp_path / "edit")
    origin(model="another")(tmp_path / "edit")
    with pytest.raises(StorageError, match="checksum"):
        Edit.from_pretrained(tmp_path / "edit")


def test_an_edit_of_the_first_format_had_no_checksum(tiny_llama: LM, tmp_path: Path) -> None:
    edit = make_edit(tiny_llama)
    edit.save_pretrained(tmp_path / "edit")

    def older(head: dict[str, Any]) -> dict[str, Any]:
        kept = without(head["origin"], "upon")
        return {"format": 1, "origin": kept, "card": head["card"]}

    rewrite("edit.json", older)(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").origin == edit.origin


def test_as_bytes_and_back(tiny_llama: LM, tmp_path: Path) -> None:
    edit = make_edit(tiny_llama)
    data = edit.to_bytes()
    again = Edit.from_bytes(data)
    assert again.to_bytes() == data == edit.to_bytes()
    assert (again.origin, again.card, again.digest) == (edit.origin, edit.card, edit.digest)
    edit.save_pretrained(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").digest == edit.digest
    assert edit.with_card({}).digest != edit.digest


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: b"{}" + d, lambda d: d[:40]])
def test_damaged_bytes_are_named(tiny_llama: LM, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(StorageError, match="damaged"):
        Edit.from_bytes(damage(make_edit(tiny_llama).to_bytes()))


def test_to_the_hub_and_back(tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here: what is asked of it is what its client is documented to do."""
    edit, calls = make_edit(tiny_llama), []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert edit.push_to_hub("user/an-edit", private=True, token="t") == "https://hub/user/an-edit"
    assert calls == [("token", "t"), ("user/an-edit", True, True)]
    assert Edit.from_pretrained("user/an-edit").digest == read_edit("user/an-edit").digest == edit.digest
    assert (tmp_path / "user/an-edit/README.md").read_text().startswith("---\nlibrary_name:")


def test_a_hub_that_cannot_be_reached_is_said(tiny_llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "HfApi", fails)
    with pytest.raises(StorageError, match="nor a repository on the hub"):
        Edit.from_pretrained("user/nothing")
    with pytest.raises(StorageError, match="Cannot write to user/nothing"):
        make_edit(tiny_llama).push_to_hub("user/nothing")


# ------------------------------------------------------------------------------- values that are computed with


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attached_and_detached_a_thousand_times(dtype: torch.dtype, lm: LM) -> None:
    model = LM(copy.deepcopy(lm.model).to(dtype), lm.tokenizer)
    edit, before = make_edit(model), logits(model)
    with unchanged(model.model):
        for _ in range(1000):
            edit.attach(model).detach()
        assert torch.equal(logits(model), before)


def test_composed_edits_do_what_they_do_together(lm: LM) -> None:
    edits = [make_edit(lm) for _ in range(3)]
    last = find_sites(lm.model)[-1].name
    edits[1] = dataclasses.replace(edits[1], deltas={last: edits[1].deltas[last]})
    whole = compose(edits)
    assert whole.rank == 6
    assert whole.origin.requests == (REQUEST,) * 3
    assert whole.origin.settings == {"of": [edit.digest for edit in edits]}
    with edits[0].applied(lm), edits[1].applied(lm), edits[2].applied(lm):
        expected = logits(lm)
    with whole.applied(lm):
        torch.testing.assert_close(logits(lm), expected, rtol=1e-4, atol=1e-5)
    rest = compose([edits[0], edits[2]])
    for name, delta in rest.deltas.items():
        assert torch.equal(
            delta.left, torch.cat([edits[0].deltas[name].left, edits[2].deltas[name].left], -1)
        )


def test_what_cannot_be_composed(tiny_llama: LM, tiny_gpt2: LM) -> None:
    with pytest.raises(MismatchError, match="different models"):
        compose([make_edit(tiny_llama), make_edit(tiny_gpt2)])
    with pytest.raises(RequestError, match="nothing to compose"):
        compose([])


def test_scaled(lm: LM) -> None:
    edit = make_edit(lm)
    twice = edit.scale(2.0)
    for name, delta in edit.deltas.items():
        torch.testing.assert_close(twice.deltas[name].dense(), 2 * delta.dense())
    assert twice.scale(0.5).card["scaled_by"] == 1.0
    with edit.scale(0.0).applied(lm):
        nothing = logits(lm)
    assert torch.equal(nothing, logits(lm))


def test_compacted_it_says_what_was_lost(lm: LM) -> None:
    whole = compose([make_edit(lm) for _ in range(3)])
    lost = size = 0.0
    small = whole.compact(rank=2)
    for name, delta in whole.deltas.items():
        dense = delta.dense().double()
        values = torch.linalg.svdvals(dense)
        error = float((small.deltas[name].dense().double() - dense).norm())
        assert error == pytest.approx(float(values[2:].norm()), rel=1e-4)  # the best there is
        lost, size = lost + error**2, size + float(dense.norm()) ** 2
    assert small.card["compacted"]["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert small.card["compacted"]["rank"] == small.rank == 2
    assert small.card["compacted"]["worst_site_error"] >= small.card["compacted"]["error"]
    exact = compose([whole, whole]).compact()
    assert exact.rank == 6  # what is there twice is found
    assert exact.card["compacted"]["error"] < 1e-5
    assert max(whole.compact(tolerance=0.5).ranks.values()) < 6
    for wrong in ({"rank": 0}, {"tolerance": -1.0}):
        with pytest.raises(RequestError):
            whole.compact(**wrong)


def test_differences(lm: LM) -> None:
    a, b = make_edit(lm), make_edit(lm)
    first, last = find_sites(lm.model)[0].name, find_sites(lm.model)[-1].name
    b = dataclasses.replace(b, deltas={name: delta for name, delta in b.deltas.items() if name != first})
    found = diff(a, b)
    one, other = a.deltas[last].dense().double(), b.deltas[last].dense().double()
    assert found.sites[last].between == pytest.approx(float((one - other).norm()), rel=1e-5)
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    assert found.sites[last].cosine == pytest.approx(cosine, abs=1e-5)
    assert found.sites[first].error == 1.0 and found.sites[first].cosine == 0.0
    assert diff(b, a).sites[first].error == float("inf")
    assert diff(a, a).error == pytest.approx(0.0, abs=1e-6)
    assert diff(a, a.scale(3.0)).error == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_and_restored(dtype: torch.dtype, lm: LM) -> None:
    model = LM(copy.deepcopy(lm.model).to(dtype), lm.tokenizer)
    edit, before = make_edit(model), logits(model)
    with unchanged(model.model):
        merged = edit.merge_(model)
        assert 0 < merged.loss < (1e-5 if dtype == torch.float32 else 0.3)
        assert not torch.equal(logits(model), before)
        merged.restore()
        assert torch.equal(logits(model), before)


def test_many_edits_cost_no_more_than_the_matrix(lm: LM) -> None:
    """The factors of many edits are multiplied out: one product a matrix, and the same answer."""
    edits = [make_edit(lm) for _ in range(40)]  # rank 80 in matrices of 32 x 48
    whole = compose(edits)
    with whole.applied(lm):
        hooks = [
            hook for name in whole.deltas for hook in lm.model.get_submodule(name)._forward_hooks.values()
        ]
        found = logits(lm)
    assert len(hooks) == len(whole.deltas)
    assert all(hook.dense is not None for hook in hooks)
    merged = LM(copy.deepcopy(lm.model), lm.tokenizer)
    for name, delta in whole.deltas.items():
        site = next(site for site in find_sites(lm.model) if site.name == name)
        site.weight(merged.model).add_(delta.dense())
    torch.testing.assert_close(found, logits(merged), rtol=1e-3, atol=1e-3)
