"""Mutated edits and adapters are used as they are or refused with an error of emendo's, whatever their files hold."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from cases import build_lm
from emendo import _storage as files
from emendo.editors import read_edit
from emendo.edits import Edit, Origin, Request, compose, conflicts, from_peft, to_peft
from emendo.edits.base import _packed
from emendo.errors import EmendoError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites

PROMPT = "The capital of Fosoba is"


@cache
def model() -> LM:
    return build_lm("llama")


@cache
def edit() -> Edit:
    torch.manual_seed(0)
    deltas = {
        site.name: LowRank(torch.randn(site.d_out, 2), torch.randn(2, site.d_in))
        for site in find_sites(model().model, last=1)
    }
    origin = Origin(
        model().fingerprint,
        "tiny",
        "mend",
        {"rank": 2},
        (Request(PROMPT, "Oslo"),),
        "2026-01-01",
        upon=("a",),
    )
    answer = [{"text": "a", "probability": 0.5}]
    rows = [{"kind": "edit", "prompt": PROMPT, "before": answer, "after": answer}]
    return Edit(deltas, origin, {"reached": True, "relative_norm": 0.1, "rows": rows})


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(
        ["\ud800", "\x00", "*", "(", ".left", "weights", "cache", "in-context", "mend", "LORA"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed_json(value: Any, data: st.DataObject) -> Any:
    """The value with one place replaced, removed or added to."""
    path = data.draw(st.sampled_from([*places(value)]))
    new = data.draw(VALUES)
    if not path:
        return new
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "remove":
        del holder[path[-1]]
    elif how == "add" and isinstance(holder, dict):
        holder[data.draw(st.text(max_size=3))] = new
    else:
        holder[path[-1]] = new
    return value


def changed_tensors(tensors: dict[str, Tensor], data: st.DataObject) -> dict[str, Tensor]:
    """The tensors with one removed, renamed, or of another shape, type or content."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    old = tensors[name]
    change = data.draw(
        st.sampled_from(
            ["remove", "rename", "turn", "cut", "flat", "deep", "none", "bytes", "nan", "int", "half"]
        )
    )
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    made: dict[str, Callable[[], Tensor]] = {
        "turn": lambda: old.T,
        "cut": lambda: old[:, :1] if old.dim() > 1 else old[:1],
        "flat": lambda: old.flatten(),
        "deep": lambda: old[None],
        "none": lambda: old[:0],
        "bytes": lambda: old.to(torch.int8),
        "nan": lambda: torch.full_like(old, float("nan")),
        "int": lambda: old.long(),
        "half": lambda: old.half(),
    }
    if change == "remove":
        return rest
    if change == "rename":
        return {**rest, name[data.draw(st.integers(0, len(name))) :] + data.draw(st.text(max_size=3)): old}
    return {**rest, name: made[change]().contiguous()}


def changed_bytes(content: bytes, data: st.DataObject) -> bytes:
    """The content cut, or with some of its bytes replaced."""
    at = data.draw(st.integers(0, len(content)))
    new = data.draw(st.binary(max_size=9))
    return content[:at] + new + (content[at + len(new) :] if data.draw(st.booleans()) else b"")


def mutate(folder: Path, json_name: str, tensors_name: str, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(["json", "tensors", "bytes of json", "bytes of tensors"]))
    if how == "json":
        value = changed_json(json.loads((folder / json_name).read_text()), data)
        with suppress(UnicodeEncodeError):
            (folder / json_name).write_text(json.dumps(value))
    elif how == "tensors":
        with suppress(SafetensorError, UnicodeEncodeError):
            files.write_tensors(
                folder / tensors_name, changed_tensors(files.read_tensors(folder / tensors_name), data)
            )
    else:
        file = folder / (json_name if how.endswith("json") else tensors_name)
        file.write_bytes(changed_bytes(file.read_bytes(), data))


def sign(folder: Path) -> None:
    """Give an edit a checksum that fits, where it can have one."""
    with suppress(Exception):
        head = json.loads((folder / "edit.json").read_text())
        del head["checksum"]
        tensors = files.read_tensors(folder / "edit.safetensors")
        head["checksum"] = hashlib.sha256(_packed(head, tensors)).hexdigest()
        (folder / "edit.json").write_text(json.dumps(head))


def export(change: Edit, folder: Path) -> None:
    """Export without the proof, which takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        to_peft(change, model(), folder)


def use(change: Any, folder: Path) -> None:
    """What commands do with an edit."""
    change.save_pretrained(folder / "again")
    assert type(change).from_pretrained(folder / "again").digest == change.digest
    conflicts([change, change])
    with change.applied(model()) as edited:
        edited.generate(PROMPT, 1)
    change.relative_norms(model())
    if isinstance(change, Edit):
        compose([change, change.scale(0.5)]).compact()
        export(change, folder / "adapter")


def attempt(action: Callable[[], Any], folder: Path) -> None:
    with suppress(EmendoError):
        use(action(), folder)


EXAMPLES = pytest.mark.parametrize("examples", [15, pytest.param(700, marks=pytest.mark.slow)])


@EXAMPLES
@pytest.mark.parametrize("signed", [False, True])
def test_a_mutated_edit_is_used_or_refused(signed: bool, examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            edit().save_pretrained(folder / "edit")
            mutate(folder / "edit", "edit.json", "edit.safetensors", data)
            if signed:
                sign(folder / "edit")
            attempt(lambda: read_edit(folder / "edit"), folder)

    check()


@EXAMPLES
def test_mutated_bytes_are_used_or_refused(examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as name:
            attempt(lambda: Edit.from_bytes(changed_bytes(edit().to_bytes(), data)), Path(name))

    check()


@EXAMPLES
def test_a_mutated_adapter_is_used_or_refused(examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            export(edit(), folder / "first")
            mutate(folder / "first", "adapter_config.json", "adapter_model.safetensors", data)
            attempt(lambda: from_peft(folder / "first", model()), folder)

    check()
