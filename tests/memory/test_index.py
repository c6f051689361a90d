"""The index finds what a search through all scopes finds, wherever they are, and forgets what is taken out."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from emendo.memory import index as index_module
from emendo.memory import nearest
from emendo.memory.index import Index, Scope
from emendo.memory.words import Prompt, occurs

NAMES = ["Ada Lopez", "Bo Chen", "Ada Smith", "Chen", "New Lopez", "Dov", "Uru", "Pell Abd"]
FORMS = ["The mother tongue of {} is", "{} was born in", "Where does {} work? In"]
SIZE = 16


def scopes(count: int) -> list[Scope]:
    rng = random.Random(0)
    return [
        Scope(n, Prompt.read(rng.choice(FORMS).format(name := rng.choice(NAMES)), name), mark=1000 + n)
        for n in range(count)
    ]


def keys(count: int, size: int = SIZE) -> NDArray[np.float32]:
    found = np.random.default_rng(0).normal(size=(count, 2, size)).astype(np.float32)
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float16).astype(np.float32)


@pytest.fixture(params=["tables", "packed", "graph"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the scopes of a small index are, as if they were many."""
    if request.param != "tables":
        monkeypatch.setattr(index_module, "_RECENT", 8)
    if request.param == "graph":
        pytest.importorskip("usearch")
        monkeypatch.setattr(nearest, "EXACT_UP_TO", 10)
    return str(request.param)


def filled(count: int, folder: Path | None = None, at_once: int = 7, size: int = SIZE) -> Index:
    index, own = Index(size, folder), scopes(count)
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        index.add(own[part], keys(count, size)[part] if size else None)
    return index


def found(index: Index, query: Prompt, key: NDArray[np.float32] | None = None) -> set[tuple[int, Prompt]]:
    return {(index.edit(row), index.prompt(row)) for row in index.candidates(query, key)}


def test_every_scope_whose_subject_is_named_is_found(kind: str) -> None:
    index, own = filled(60, size=0), scopes(60)
    for name in NAMES:
        query = Prompt.read(f"It rained. {name}, born in")
        named = {(scope.edit, scope.prompt) for scope in own if occurs(scope.prompt.subject, query.words)}
        assert named <= found(index, query)


def test_the_nearest_subject_keys_are_found(kind: str) -> None:
    index, every = filled(40), keys(40)
    for want in (3, 39):
        near = np.argsort(every[:, 0] @ every[want, 0])[-8:]
        rows = index.candidates(Prompt.read("xyzzy"), every[want])
        assert set(near) <= {index.edit(row) for row in rows}
        assert np.array_equal(index.key(rows), every[[index.edit(row) for row in rows]])


def test_what_is_taken_out_is_as_if_it_had_never_been_there(kind: str) -> None:
    index, query, every = filled(60), Prompt.read("Ada Smith was born in"), keys(60)
    gone = {3, 17, 42, 59, *np.argsort(every[:, 0] @ every[9, 0])[-12:].tolist()}
    for edit in gone:
        index.remove(edit)
    without, kept = Index(SIZE), [n for n in range(60) if n not in gone]
    without.add([scopes(60)[n] for n in kept], every[kept])
    assert found(index, query, every[9]) == found(without, query, every[9])
    assert index.numbers == set(kept)


def test_packing_again_leaves_out_what_is_gone(kind: str) -> None:
    index, every = filled(40), keys(60)
    for edit in range(30):
        index.remove(edit)
    index.add(scopes(60)[40:], every[40:])
    without = Index(SIZE)
    without.add(scopes(60)[30:], every[30:])
    for name in NAMES:
        query = Prompt.read(f"{name} was born in")
        assert found(index, query, every[45]) == found(without, query, every[45])


def test_a_stored_index_gives_the_edits_whose_marks_are_wanted(kind: str, tmp_path: Path) -> None:
    index, every, query = filled(40, tmp_path / "index"), keys(40), Prompt.read("Ada Lopez, who was born in")
    index.write()
    again = Index(SIZE, tmp_path / "index")
    again.keep({n: 1000 + n for n in range(40)})
    if kind == "tables":  # too few to be stored
        assert again.numbers == set()
        return
    missing = [n for n in range(40) if n not in again.numbers]
    again.add([scopes(40)[n] for n in missing], every[missing])
    assert found(again, query, every[5]) == found(index, query, every[5])
    again.remove(5)
    assert 5 not in {edit for edit, _ in found(again, query, every[5])}
    changed = Index(SIZE, tmp_path / "index")
    changed.keep({3: 1003, 4: 9999, 77: 1077})  # 4 is another edit now, and 77 unknown
    assert changed.numbers == {3}


def test_a_stored_index_grows(kind: str, tmp_path: Path) -> None:
    every = keys(60)
    filled(40, tmp_path / "index").write()
    index = Index(SIZE, tmp_path / "index")
    index.keep({n: 1000 + n for n in range(40)})
    missing = [n for n in range(60) if n not in index.numbers]
    index.add([scopes(60)[n] for n in missing], every[missing])
    index.write()
    for n in (0, 30, 59):
        query = Prompt.read(scopes(60)[n].prompt.text)
        assert found(index, query, every[n]) == found(filled(60), query, every[n])


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "head", "size"])
def test_a_damaged_index_is_empty_and_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_RECENT", 8)
    folder = tmp_path / "index"
    filled(40, folder, at_once=40).write()
    assert len(Index(SIZE, folder).numbers) == 40
    file = next(folder.glob("*/words.rows.npy"))
    if damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "removed":
        file.unlink()
    elif damage == "head":
        (folder / "index.json").write_text("{")
    again = Index(SIZE + (damage == "size"), folder)
    again.keep({n: 1000 + n for n in range(40)})
    assert again.numbers == set()
    again.add(scopes(40), keys(40, again.size))
    again.write()
    assert len(Index(again.size, folder).numbers) == 40


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_RECENT", 8)
    folder = tmp_path / "index"
    index = filled(40, folder, at_once=40)
    index.write()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        index.add(scopes(80)[40:], keys(80)[40:])
        index.write()
    query = Prompt.read("Ada Lopez was born in")
    assert found(index, query, keys(80)[70]) == found(filled(80), query, keys(80)[70])
    assert Index(SIZE, folder).numbers == set(range(40))
    assert len(list(folder.iterdir())) == 2
