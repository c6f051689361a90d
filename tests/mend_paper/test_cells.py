"""Digests, and what is kept in a comparison's folder."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reproduction.mend_paper.cells import Cell, Folder, Match, Result, with_seed

from emendo._storage import digest
from emendo.errors import StorageError
from emendo.evaluate.intervals import Interval

CELL = Cell("wikitext", "mend", {"rank": 8}, training={"steps": 5, "lr": 1e-4})
SIZES = {"train": 9, "validation": 3, "test": 4, "test_passages": 2}
CACHE = Cell("wikitext", "mend", match=Match(CELL))


def key(cell: Cell, model: str = "m", **sizes: int) -> str:
    return digest(cell.key(model, {**SIZES, **sizes}))


def editor_key(cell: Cell, model: str = "m", **sizes: int) -> str:
    return digest(cell.editor_key(model, {**SIZES, **sizes}))


CHANGES: list[dict[str, Any]] = [
    {"task": "counterfact"},
    {"editor": "enn", "settings": {}},
    {"settings": {"rank": 9}},
    {"settings": {"rank": 8, "norm": False}},
    {"sites": "attention"},
    {"last": 2},
    {"k": 4, "training": {"steps": 5, "lr": 1e-4, "batch": 4}},
    {"training": {"steps": 6, "lr": 1e-4}},
    {"training": {"steps": 5}},
    {"seed": 1},
    {"dtype": "bfloat16"},
]
ONLY_MEASURED: list[dict[str, Any]] = [{"facts": 99}, {"match": Match(CELL)}, {"k": 4, "trained_for": 1}]


@pytest.mark.parametrize("change", [*CHANGES, *ONLY_MEASURED])
def test_every_setting_makes_another_cell(change: dict[str, Any]) -> None:
    assert key(replace(CELL, **change)) != key(CELL)
    assert (editor_key(replace(CELL, **change)) == editor_key(CELL)) == (change in ONLY_MEASURED)


def test_model_and_data_make_another_cell() -> None:
    keys = {key(CELL), key(CELL, "n"), *(key(CELL, **{name: 77}) for name in SIZES)}
    assert len(keys) == 2 + len(SIZES)
    assert editor_key(CELL, "n") != editor_key(CELL)
    assert [name for name in SIZES if editor_key(CELL, **{name: 77}) == editor_key(CELL)] == [
        "test",
        "test_passages",
    ]


def test_what_makes_no_difference() -> None:
    turned = replace(CELL, training={"lr": 1e-4, "steps": 5}, settings={"norm": True, "rank": 8})
    assert key(turned) == key(CELL)  # another order, and a default spelt out
    assert key(replace(CELL, training={**CELL.training, "checkpoint_every": 1.0})) == key(CELL)
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_match_is_told_apart() -> None:
    others = [replace(CACHE, match=Match(CELL, 2.0)), replace(CACHE, match=Match(replace(CELL, seed=1)))]
    assert len({key(CACHE), *map(key, others)}) == 3
    assert with_seed(CACHE, 3) == replace(CACHE, seed=3, match=Match(replace(CELL, seed=3)))


RESULT = Result(
    {
        "edit_success": Interval(0.5, 0.25, 0.75),
        "perplexity_drawdown": Interval(math.inf, math.inf, math.inf),
    },
    {"steps": 5},
    12.5,
    "radius 2",
)


def test_a_cell_is_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    whole = CELL.key("m", SIZES)
    assert folder.read(whole) is None
    folder.write(whole, RESULT, {"date": "today"})
    kept = folder.read(whole)
    assert kept is not None
    assert kept.figures["edit_success"] == RESULT.figures["edit_success"]
    assert math.isnan(kept.figures["perplexity_drawdown"].mean)
    assert (kept.training, kept.seconds, kept.note) == ({"steps": 5}, 12.5, "radius 2")
    text = folder.cell(whole).read_text()
    assert "Infinity" not in text
    assert json.loads(text)["cell"] == whole
    assert [file.name for file in (tmp_path / "cells").iterdir()] == [f"{digest(whole)}.json"]


def test_the_latest_is_found_without_the_model(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.latest() == {}
    for model, seconds in (("m", 1.0), ("n", 2.0), ("o", 3.0)):
        folder.write(CELL.key(model, SIZES), replace(RESULT, seconds=seconds), {})
        os.utime(folder.cell(CELL.key(model, SIZES)), (seconds, -seconds))
    folder.write(replace(CELL, seed=1).key("m", SIZES), replace(RESULT, seconds=9.0), {})
    found = folder.latest()
    assert len(found) == 2
    assert found[digest(CELL.plan())].seconds == 1.0


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"cell": {}, "figures": 3}', '{"cell": {}, "figures": {"a": 1}}']
)
def test_a_damaged_cell_is_named(tmp_path: Path, text: str) -> None:
    folder, whole = Folder(tmp_path), CELL.key("m", SIZES)
    folder.cell(whole).parent.mkdir()
    folder.cell(whole).write_text(text)
    for look in (lambda: folder.read(whole), lambda: folder.latest()):
        with pytest.raises(StorageError, match=f"{digest(whole)}.json is damaged"):
            look()
