"""The scopes of many edits as arrays, in memory or in a memory-mapped folder.

The folder is a cache: each of its files has a checksum, and whoever finds it missing, damaged or of another kind makes
it again. It is written beside the old one and then takes its place, so a full disk or a killed process leaves the old
one.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from emendo._storage import new_file, read_json, write_json
from emendo.errors import StorageError
from emendo.memory.nearest import Graph, Nearest, graphs_are_available, nearest
from emendo.memory.postings import Postings, hashed
from emendo.memory.words import Prompt

_FORMAT = 1
_HEAD, _GRAPH = "index.json", "graph.usearch"
LONGEST_NAME = 12
"""Words of a name by which an edit is found."""


@dataclass(frozen=True, slots=True)
class Scope:
    """One way to ask for an edit: its prompt or a paraphrase, with one name of the subject.

    Attributes:
        edit: the number of the edit.
        prompt: the wording.
        mark: identifies the edit with all its wordings to other processes; 0 for none.
    """

    edit: int
    prompt: Prompt
    mark: int = 0


def name_of(words: Sequence[str]) -> str:
    """A name of several words, as it is looked up."""
    return " ".join(words[:LONGEST_NAME])


@dataclass(frozen=True)
class Segment:
    """Scopes by row.

    Attributes:
        edits: the number of each row's edit.
        marks: its mark.
        text: the words of the subject and the wording of all rows, in UTF-8.
        ends: ``[2 n]``, where the subject and the wording of each row end in it.
        keys: ``[n, 2, size]``; ``[n, 2, 0]`` without keys.
        names: rows by the subject.
        words: rows by each word.
        near: finds rows by the subject's key; None without keys.
    """

    edits: NDArray[np.int64]
    marks: NDArray[np.uint64]
    text: NDArray[np.uint8]
    ends: NDArray[np.uint64]
    keys: NDArray[np.float16]
    names: Postings
    words: Postings
    near: Nearest | None

    @classmethod
    def empty(cls, size: int) -> Segment:
        """No scopes, with keys of the given size."""
        return cls(
            np.empty(0, np.int64),
            np.empty(0, np.uint64),
            np.empty(0, np.uint8),
            np.empty(0, np.uint64),
            np.empty((0, 2, size), np.float16),
            Postings.empty(),
            Postings.empty(),
            None,
        )

    def __len__(self) -> int:
        return len(self.edits)

    def extended(self, scopes: Sequence[Scope], keys: NDArray[np.floating]) -> Segment:
        """With further rows."""
        rows = np.arange(len(self), len(self) + len(scopes), dtype=np.uint32)
        parts = [
            part.encode(errors="surrogatepass")
            for scope in scopes
            for part in (" ".join(scope.prompt.subject), scope.prompt.text)
        ]
        ends = np.cumsum([len(part) for part in parts], dtype=np.uint64) + np.uint64(len(self.text))
        known = [sorted(scope.prompt.known) for scope in scopes]
        near = None
        if self.keys.shape[2]:
            near = nearest(keys[:, 0]) if self.near is None else self.near.extended(keys[:, 0])
        return Segment(
            np.concatenate([self.edits, [scope.edit for scope in scopes]]).astype(np.int64),
            np.concatenate([self.marks, np.array([scope.mark for scope in scopes], np.uint64)]),
            np.concatenate([self.text, np.frombuffer(b"".join(parts), np.uint8)]),
            np.concatenate([self.ends, ends]),
            np.concatenate([self.keys, keys.astype(np.float16)]),
            self.names.extended(hashed([name_of(scope.prompt.subject) for scope in scopes]), rows),
            self.words.extended(
                hashed([word for own in known for word in own]),
                np.repeat(rows, [len(own) for own in known]),
            ),
            near,
        )

    def prompt(self, row: int) -> Prompt:
        """The wording of a row."""
        start = int(self.ends[2 * row - 1]) if row else 0
        middle, end = int(self.ends[2 * row]), int(self.ends[2 * row + 1])
        subject, text = (
            self.text[a:b].tobytes().decode(errors="surrogatepass")
            for a, b in ((start, middle), (middle, end))
        )
        return Prompt.of(text, tuple(subject.split()))

    # ------------------------------------------------------------------------------------------ files

    def write(self, folder: Path) -> Segment:
        """Write a folder, in place of the one that is there; returns the same scopes, memory-mapped.

        Raises:
            StorageError: it cannot be written; the old one is unchanged.
        """
        own = folder / uuid.uuid4().hex
        try:
            own.mkdir(parents=True)
            checks = {}
            for name, array in self._arrays():
                np.save(own / f"{name}.npy", array)
                checks[f"{name}.npy"] = _checksum(own / f"{name}.npy")
            if isinstance(self.near, Graph):
                self.near.write(own / _GRAPH)
                checks[_GRAPH] = _checksum(own / _GRAPH)
            with new_file(folder / _HEAD) as file:
                write_json(file, {"format": _FORMAT, "folder": own.name, "checks": checks})
        except (OSError, RuntimeError) as error:  # usearch raises RuntimeError
            shutil.rmtree(own, ignore_errors=True)
            raise StorageError(f"The index in {folder} cannot be written: {error}") from error
        for old in folder.iterdir():
            if old.is_dir() and old != own:
                shutil.rmtree(old, ignore_errors=True)
        return Segment.read(folder, self.keys.shape[2])

    def _arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for name in ("edits", "marks", "text", "ends", "keys"):
            yield name, getattr(self, name)
        for name in ("names", "words"):
            postings: Postings = getattr(self, name)
            yield f"{name}.hashes", postings.hashes
            yield f"{name}.rows", postings.rows

    @classmethod
    def read(cls, folder: Path, size: int) -> Segment:
        """Map a folder.

        Raises:
            StorageError: it is missing, damaged, of another format, or its keys have another size.
        """
        try:
            head = read_json(folder / _HEAD)
            own = folder / str(head["folder"])
            checks = dict(head["checks"])
            if head["format"] != _FORMAT or any(_checksum(own / name) != sum for name, sum in checks.items()):
                raise StorageError(f"The index in {folder} is damaged.")
            found = {
                name.removesuffix(".npy"): np.load(own / name, mmap_mode="r")
                for name in checks
                if name.endswith(".npy")
            }
            names, words = (
                Postings(found[f"{name}.hashes"], found[f"{name}.rows"]) for name in ("names", "words")
            )
            keys = found["keys"]
            if keys.shape[1:] != (2, size):
                raise StorageError(f"The index in {folder} belongs to another router.")
            near: Nearest | None = None
            if size and _GRAPH in checks and graphs_are_available():
                near = Graph.read(own / _GRAPH)
            elif size and len(keys):
                near = nearest(keys[:, 0])
            return cls(found["edits"], found["marks"], found["text"], found["ends"], keys, names, words, near)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"The index in {folder} cannot be read: {error}") from error


def _checksum(file: Path) -> int:
    """The checksum of a file."""
    found = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found = crc32(part, found)
    return found
