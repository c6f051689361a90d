"""Each key is computed once, and a damaged or half-written one again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from emendo.memory.key_file import KeyFile

SIZE = 5


class Computed:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += prompts
        return np.stack([key_of(text) for text in prompts])


def key_of(text: str) -> NDArray[np.float32]:
    return np.random.default_rng(len(text)).normal(size=(2, SIZE)).astype(np.float16).astype(np.float32)


def check(file: KeyFile, prompts: list[str], computed: Computed) -> None:
    assert np.array_equal(file.keys(prompts, computed), np.stack([key_of(text) for text in prompts]))


def test_a_key_is_computed_once(tmp_path: Path) -> None:
    computed = Computed()
    check(KeyFile(tmp_path / "k" / "keys", SIZE), ["a", "bb", "a"], computed)
    again = KeyFile(tmp_path / "k" / "keys", SIZE)
    check(again, ["bb", "ccc", "a"], computed)
    check(again, ["ccc"], computed)
    assert computed.asked == ["a", "bb", "ccc"]


def test_two_writers_see_each_others_keys(tmp_path: Path) -> None:
    computed, one, two = Computed(), KeyFile(tmp_path / "keys", SIZE), KeyFile(tmp_path / "keys", SIZE)
    check(one, ["a"], computed)
    check(two, ["a", "bb"], computed)
    check(one, ["bb", "a"], computed)
    assert computed.asked == ["a", "bb"]


def test_damaged_and_half_written_rows_are_computed_again(tmp_path: Path) -> None:
    path, computed = tmp_path / "keys", Computed()
    check(KeyFile(path, SIZE), ["a", "bb", "ccc"], computed)
    data = bytearray(path.read_bytes())
    row = len(data) // 3
    data[row + 25] ^= 0xFF  # in the key of "bb"
    path.write_bytes(bytes(data[:-3]))  # and the end of "ccc" is missing
    check(KeyFile(path, SIZE), ["a", "bb", "ccc"], computed)
    check(KeyFile(path, SIZE), ["a", "bb", "ccc"], computed)
    assert computed.asked == ["a", "bb", "ccc", "bb", "ccc"]


def test_a_file_that_was_begun_anew_is_read_anew(tmp_path: Path) -> None:
    path, computed = tmp_path / "keys", Computed()
    one = KeyFile(path, SIZE)
    check(one, ["a"], computed)
    path.unlink()
    check(KeyFile(path, SIZE), ["bb", "ccc"], computed)
    check(one, ["a", "ccc"], computed)


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, computed = tmp_path / "keys", Computed()
    file = KeyFile(path, SIZE)
    check(file, ["a"], computed)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        check(file, ["bb", "a", "ccc"], computed)
    check(file, ["bb", "a"], computed)
    assert computed.asked == ["a", "bb", "ccc", "bb"]
