"""Edits: attached and detached, saved and loaded, refused by other models."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cases import unchanged
from damage import Damage, cut, drop_tensor, full_disk, remove, rewrite, without
from emendo import _storage as files
from emendo.editors import read_edit
from emendo.edits import Edit, Origin, Request, compose, conflicts, diff
from emendo.edits.base import _packed
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models._fingerprint import fingerprint
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


# ----------------------------------------------------------------------------- attached and detached


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


def test_detached_after_an_exception(lm: LM) -> None:
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


def test_two_edits_can_be_detached_in_any_order(lm: LM) -> None:
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
        assert fingerprint(tiny_gpt2.model) in str(error.value)
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
    with pytest.raises(StorageError, match="already holds"):
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
    """Damage to the origin of an edit."""
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
    "nested 100,000 deep": lambda folder: (folder / "edit.json").write_text("[" * 100_000) and None,
    "an integer of 5,000 digits": lambda folder: (folder / "edit.json").write_text("1" * 5_000) and None,
    "half of a surrogate pair": rewrite("edit.json", lambda head: {**head, "card": {"a": "\ud800"}}),
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


def test_the_first_format_is_no_way_around_the_checksum(tiny_llama: LM, tmp_path: Path) -> None:
    make_edit(tiny_llama).save_pretrained(tmp_path / "edit")
    rewrite("edit.json", lambda head: {**head, "format": 1})(tmp_path / "edit")
    with pytest.raises(StorageError, match="format 1"):
        Edit.from_pretrained(tmp_path / "edit")


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
    assert (tmp_path / "user/an-edit/README.md").read_text().startswith("---\nbase_model: tiny-llama\n")


def test_a_hub_that_cannot_be_reached_is_said(tiny_llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "HfApi", fails)
    with pytest.raises(StorageError, match="nor a repository on the hub"):
        Edit.from_pretrained("user/nothing")
    with pytest.raises(StorageError, match="Cannot write to user/nothing"):
        make_edit(tiny_llama).push_to_hub("user/nothing")


def resigned(change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Damage:
    """Change the content of an edit, and give it a checksum that fits."""

    def damage(folder: Path) -> None:
        head, tensors = files.read_json(folder / "edit.json"), files.read_tensors(folder / "edit.safetensors")
        del head["checksum"]
        change(head, tensors)
        files.write_tensors(folder / "edit.safetensors", tensors)
        checksum = hashlib.sha256(_packed(head, tensors)).hexdigest()
        files.write_json(folder / "edit.json", {**head, "checksum": checksum})

    return damage


NAME = "model.layers.3.mlp.down_proj"


def tensors(**new: Tensor | None) -> Damage:
    """Other factors at one matrix; None removes one."""

    def change(head: dict[str, Any], old: dict[str, Tensor]) -> None:
        old |= {f"{NAME}.{side}": tensor for side, tensor in new.items() if tensor is not None}
        for side, tensor in new.items():
            if tensor is None:
                del old[f"{NAME}.{side}"]

    return resigned(change)


def head(**new: Any) -> Damage:
    return resigned(lambda head, _: head.update(new))


BAD: dict[str, Damage] = {
    "only a right factor": tensors(left=None),
    "only a left factor": tensors(right=None),
    "1-D": tensors(left=torch.zeros(32)),
    "3-D": tensors(left=torch.zeros(2, 32, 2), right=torch.zeros(2, 2, 48)),
    "ranks that differ": tensors(left=torch.zeros(32, 3)),
    "rank 0": tensors(left=torch.zeros(32, 0), right=torch.zeros(0, 48)),
    "whole numbers": tensors(
        left=torch.ones(32, 2, dtype=torch.int8), right=torch.ones(2, 48, dtype=torch.int8)
    ),
    "NaN": tensors(left=torch.full((32, 2), float("nan"))),
    "infinity": tensors(right=torch.full((2, 48), float("inf"))),
    "a tensor that is no factor": tensors(bias=torch.zeros(32)),
    "a card that is a list": head(card=[]),
    "a card with a wrong factor": head(card={"scaled_by": "x"}),
    "another kind": head(kind="cache"),
    "a kind that is a list": head(kind=[]),
    "format true": head(format=True),
    "an origin without a date": resigned(lambda head, _: head["origin"].pop("date")),
    "settings that are a text": resigned(lambda head, _: head["origin"].update(settings="x")),
    "a model that is a number": resigned(lambda head, _: head["origin"].update(model=3)),
    "upon numbers": resigned(lambda head, _: head["origin"].update(upon=[1])),
    "an empty prompt": resigned(
        lambda head, _: head["origin"].update(requests=[{"prompt": "", "target": "a"}])
    ),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD.keys())
def test_bad_content_with_a_valid_checksum_is_named(tiny_llama: LM, tmp_path: Path, damage: Damage) -> None:
    make_edit(tiny_llama).save_pretrained(tmp_path / "edit")
    resigned(lambda head, tensors: None)(tmp_path / "edit")
    Edit.from_pretrained(tmp_path / "edit")
    damage(tmp_path / "edit")
    with pytest.raises(StorageError) as error:
        Edit.from_pretrained(tmp_path / "edit")
    assert str(tmp_path / "edit") in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [("model.layers.9.mlp.up_proj", (48, 32), "does not have"), (NAME, (48, 32), "32 x 48")],
)
def test_an_edit_that_does_not_fit_the_matrices_is_refused(
    tiny_llama: LM, name: str, shape: tuple[int, int], words: str
) -> None:
    good = make_edit(tiny_llama)
    edit = dataclasses.replace(
        good, deltas={**good.deltas, name: LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]))}
    )
    for use in (edit.attach, edit.merge_, edit.check):
        with pytest.raises(MismatchError, match=words):
            use(tiny_llama)


def test_an_edit_with_nan_is_neither_saved_nor_merged(tiny_llama: LM, tmp_path: Path) -> None:
    edit = make_edit(tiny_llama).scale(float("nan"))
    with pytest.raises(RequestError, match="NaN or infinite"):
        edit.save_pretrained(tmp_path / "edit")
    with pytest.raises(RequestError, match="NaN or infinite"):
        edit.merge_(tiny_llama)
    assert not (tmp_path / "edit").exists()


def test_a_request_is_text() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        Request("a\ud800", "b")


def test_facts_that_are_edited_twice(tiny_llama: LM) -> None:
    def edit(*pairs: tuple[str, str]) -> Edit:
        made = make_edit(tiny_llama)
        requests = tuple(Request(*pair) for pair in pairs)
        return dataclasses.replace(made, origin=dataclasses.replace(made.origin, requests=requests))

    edits = [edit(("A is", "x"), ("B is", "y")), edit(("Ａ  IS ", "z")), edit(("C is", "y"))]
    assert conflicts(edits) == {"A is": ("x", "z")}
    assert conflicts(edits[1:]) == {}


# ------------------------------------------------------------------------------- values that are computed with


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attached_and_detached_many_times(dtype: torch.dtype, lm: LM) -> None:
    model = LM(copy.deepcopy(lm.model).to(dtype), lm.tokenizer)
    edit, before = make_edit(model), logits(model)
    with unchanged(model.model):
        for _ in range(100):
            edit.attach(model).detach()
        assert torch.equal(logits(model), before)


def test_a_composed_edit_has_the_effect_of_its_parts(lm: LM) -> None:
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


def test_a_compacted_edit_states_its_error(lm: LM) -> None:
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
    assert exact.rank == 6  # shared directions are stored once
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
    """The factors of many edits are multiplied out: one product for each matrix, with the same result."""
    edits = [make_edit(lm) for _ in range(40)]  # rank 80 in matrices of 32 x 48
    whole = compose(edits)
    tokens = lm.tokenizer(REQUEST.prompt, return_tensors="pt").input_ids.numel()
    with FlopCounterMode(display=False) as plain:
        logits(lm)
    with whole.applied(lm), FlopCounterMode(display=False) as edited:
        found = logits(lm)
    matrices = sum(delta.shape[0] * delta.shape[1] for delta in whole.deltas.values())
    assert edited.get_total_flops() - plain.get_total_flops() == 2 * tokens * matrices
    merged = LM(copy.deepcopy(lm.model), lm.tokenizer)
    for name, delta in whole.deltas.items():
        site = next(site for site in find_sites(lm.model) if site.name == name)
        site.weight(merged.model).add_(delta.dense())
    torch.testing.assert_close(found, logits(merged), rtol=1e-3, atol=1e-3)
