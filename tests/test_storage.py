"""Atomic writes, reads of damaged files, and digests."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from damage import full_disk
from emendo import _storage as files
from emendo._outputs import Kind
from emendo._storage import (
    digest,
    local_path,
    new_file,
    new_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from emendo.errors import StorageError

ANY = Kind("a folder", lambda folder: True, ("*",))
"""Everything in the folder may be replaced."""
FULL = OSError(errno.ENOSPC, "No space left on device")


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def write_half(file: Path, error: BaseException | None) -> None:
    file.write_text("half")
    if error is not None:
        raise error


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder that holds something."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("first")
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------- folders


def test_new_folder_with_its_parents(tmp_path: Path) -> None:
    with new_folder(tmp_path / "x" / "y", ANY) as folder:
        assert not (tmp_path / "x" / "y").exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("1")
    assert tree(tmp_path) == {"x/y/sub/a.txt": "1"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    with new_folder(tmp_path, ANY) as folder:
        (folder / "a.txt").write_text("1")
    assert tree(tmp_path) == {"a.txt": "1"}


def test_what_is_there_is_refused(run: Path) -> None:
    for taken in (run, run / "a.txt"):
        with (
            pytest.raises(StorageError, match=r"already holds|not a folder") as error,
            new_folder(taken, ANY),
        ):
            pytest.fail("the folder was opened")
        assert str(taken) in str(error.value)
    assert tree(run.parent) == {"run/a.txt": "first"}


def test_overwriting_replaces_the_whole_folder(run: Path) -> None:
    with new_folder(run, ANY, overwrite=True) as folder:
        (folder / "b.txt").write_text("second")
        assert tree(run) == {"a.txt": "first"}
    assert tree(run.parent) == {"run/b.txt": "second"}
    assert list(run.parent.iterdir()) == [run]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (FULL, StorageError),
        (SafetensorError("cannot write"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_while_writing_leaves_what_was_there(
    run: Path, error: BaseException, seen: type[BaseException]
) -> None:
    with pytest.raises(seen), new_folder(run, ANY, overwrite=True) as folder:
        write_half(folder / "b.txt", error)
    assert tree(run.parent) == {"run/a.txt": "first"}
    assert list(run.parent.iterdir()) == [run]


def test_a_failure_at_the_last_moment_leaves_what_was_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the files are flushed; or the last rename fails."""
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_disk)
        with (
            pytest.raises(StorageError, match="No space left"),
            new_folder(run, ANY, overwrite=True) as folder,
        ):
            (folder / "b.txt").write_text("second")
    assert tree(run.parent) == {"run/a.txt": "first"}

    rename = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if target == run and (source / "b.txt").exists():
            raise FULL
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="unchanged"), new_folder(run, ANY, overwrite=True) as folder:
        (folder / "b.txt").write_text("second")
    assert tree(run.parent) == {"run/a.txt": "first"}


def test_a_place_that_cannot_be_written(run: Path) -> None:
    with pytest.raises(StorageError, match="Cannot write"), new_folder(run / "a.txt" / "inside", ANY):
        pytest.fail("the folder was opened")
    with pytest.raises(StorageError, match="Cannot write"), new_file(run / "a.txt" / "inside"):
        pytest.fail("the file was opened")


def test_a_neighbour_with_the_name_of_a_backup_survives(run: Path) -> None:
    (run.parent / ".run.old").mkdir()
    (run.parent / ".run.old" / "thesis.txt").write_text("mine")
    with new_folder(run, ANY, overwrite=True) as folder:
        (folder / "b.txt").write_text("second")
    assert tree(run.parent) == {".run.old/thesis.txt": "mine", "run/b.txt": "second"}


def test_a_symbolic_link_is_followed(run: Path) -> None:
    link = run.parent / "link"
    link.symlink_to(run)
    for text in ("second", "third"):
        with new_folder(link, ANY, overwrite=True) as folder:
            (folder / "b.txt").write_text(text)
        assert link.is_symlink()
        assert tree(run) == {"b.txt": text}
    (run.parent / "file").symlink_to(run / "b.txt")
    with new_file(run.parent / "file") as temporary:
        temporary.write_text("fourth")
    assert (run.parent / "file").is_symlink() and tree(run) == {"b.txt": "fourth"}


@pytest.mark.parametrize("mounted", [False, True])
def test_the_current_folder_and_mount_points_are_filled_in_place(
    run: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    """They cannot be renamed."""
    place = run if mounted else Path()
    if mounted:
        monkeypatch.setattr(Path, "is_mount", lambda path: path == run)
    else:
        monkeypatch.chdir(run)
    inode = run.stat().st_ino
    with new_folder(place, ANY, overwrite=True) as folder:
        (folder / "b.txt").write_text("second")
        (folder / "c.txt").write_text("third")
    assert run.stat().st_ino == inode
    assert tree(run) == {"b.txt": "second", "c.txt": "third"}

    rename = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if target.name == "d.txt":
            raise FULL
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="disk is full"), new_folder(place, ANY, overwrite=True) as folder:
        write_half(folder / "d.txt", None)
    assert tree(run) == {"b.txt": "second", "c.txt": "third"}


# --------------------------------------------------------------------------------------------- files


def test_new_file(tmp_path: Path) -> None:
    for text in ("1", "2"):
        with new_file(tmp_path / "x" / "a.txt") as temporary:
            temporary.write_text(text)
        assert tree(tmp_path) == {"x/a.txt": text}


@pytest.mark.parametrize("late", [False, True])
def test_the_previous_file_survives_a_full_disk(
    run: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    if late:
        monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left") as error, new_file(run / "a.txt") as temporary:
        write_half(temporary, None if late else FULL)
    assert "a.txt" in str(error.value)
    assert tree(run.parent) == {"run/a.txt": "first"}


def test_an_error_of_the_writer_is_its_own(run: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_file(run / "a.txt") as temporary:
        write_half(temporary, ZeroDivisionError())
    assert tree(run.parent) == {"run/a.txt": "first"}


def test_only_a_regular_file_is_replaced(run: Path) -> None:
    os.mkfifo(run / "pipe")
    for place in (run, run / "pipe"):
        with pytest.raises(StorageError, match="not a regular file"), new_file(place):
            pytest.fail("the file was opened")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "n" * 300])
def test_impossible_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="x" if name[0] == "~" else "too long"), new_folder(name, ANY):
        pytest.fail("the folder was opened")
    with pytest.raises(StorageError), new_file(name) as temporary:
        temporary.write_text("lost")
    for read in (read_json, read_tensors):
        with pytest.raises(StorageError):
            read(name)
    if name[0] == "~":
        with pytest.raises(StorageError, match="nosuchuser"):
            local_path(name)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- tensors and JSON


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    tensors = {
        "whole": whole,
        "turned": whole.T,
        "strided": whole[:, ::2],
        "bf16": whole.bfloat16(),
        "count": torch.tensor(3.0, dtype=torch.float64),
        "learned": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "t", tensors)
    read = read_tensors(tmp_path / "t")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.99])
def test_damaged_tensors(tmp_path: Path, keep: float) -> None:
    write_tensors(tmp_path / "t", {"a": torch.randn(20, 20)})
    content = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(StorageError, match="is damaged") as error:
        read_tensors(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value)


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "name": "Ðakovo 北京"}
    write_json(tmp_path / "j", value)
    assert read_json(tmp_path / "j") == value
    assert "北京" in (tmp_path / "j").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": ',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"1" * 5_000,
        b'["\\ud800"]',
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        read_json(tmp_path / "j")


def test_a_surrogate_pair_is_read(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('["\\ud83d\\ude00"]')
    assert read_json(tmp_path / "j") == ["\U0001f600"]


@pytest.mark.parametrize("read", [read_tensors, read_json])
def test_pipes_and_devices_are_not_read(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(StorageError, match="not a regular file"):
            read(place)


@pytest.mark.parametrize("read", [read_tensors, read_json])
def test_missing_files_and_folders_in_their_place(tmp_path: Path, read: Any) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(StorageError):
        read(tmp_path)


def test_a_digest_stands_for_a_json_value() -> None:
    assert digest({"a": 1, "b": [None, "北"]}) == digest({"b": [None, "北"], "a": 1}) == "dff26a0dfc91d17c"
    assert digest({"a": 1}) != digest({"a": 1.5}) != digest({"a": "1"})


def test_importing_it_does_not_import_torch() -> None:
    script = "import sys, emendo, emendo._storage, emendo.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
