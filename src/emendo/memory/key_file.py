"""Keys of prompts in a file, so that each prompt passes through the model once.

The file is appended to only. A row is the hash of the prompt, a checksum of the key, and the key in half precision.
Rows of an interrupted write or with damaged keys are computed again, so the file may be deleted at any time, and a disk
that is full costs time only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

_HASH = 16  # bytes


class KeyFile:
    """A file of keys, memory-mapped.

    Args:
        path: of the file; it is created when the first key is kept.
        size: numbers of each of a key's two parts.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._row = np.dtype([("hash", f"V{_HASH}"), ("crc", "<u4"), ("key", "<f2", (2, size))])
        self._rows: NDArray[np.void] = np.empty(0, self._row)
        self._places: dict[bytes, int] = {}

    def keys(
        self, prompts: Sequence[str], compute: Callable[[Sequence[str]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The keys ``[prompts, 2, size]``.

        Args:
            prompts: the prompts.
            compute: gives the keys of those that the file does not have.
        """
        hashes = [hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:_HASH] for text in prompts]
        if not self._places.keys() >= set(hashes):
            self._read()
        missing = {one: text for one, text in zip(hashes, prompts, strict=True) if not self._has(one)}
        new = dict(zip(missing, compute([*missing.values()]), strict=True)) if missing else {}
        if new:
            with suppress(OSError):  # a full disk, or a folder that may not be written
                self._append([*new], np.stack([*new.values()]))
                self._read()
        found = [new[one] if one in new else self._rows["key"][self._places[one]] for one in hashes]
        return np.stack(found).astype(np.float16).astype(np.float32)

    def _has(self, hash: bytes) -> bool:
        place = self._places.get(hash)
        if place is None:
            return False
        row = self._rows[place]
        return bool(row["hash"].tobytes() == hash and crc32(row["key"].tobytes()) == row["crc"])

    def _append(self, hashes: Sequence[bytes], keys: NDArray[np.float32]) -> None:
        rows = np.empty(len(hashes), self._row)
        for place, (one, key) in enumerate(zip(hashes, keys.astype(np.float16), strict=True)):
            rows[place] = (np.void(one), crc32(key.tobytes()), key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            odd = file.seek(0, os.SEEK_END) % self._row.itemsize
            file.write(b"\0" * (self._row.itemsize - odd if odd else 0) + rows.tobytes())

    def _read(self) -> None:
        """Map the whole rows of the file; of a prompt that stands in it twice, the later row counts."""
        if not self.path.exists():
            return
        known, count = len(self._rows), self.path.stat().st_size // self._row.itemsize
        if count < known:  # the file was deleted and begun anew
            known, self._places = 0, {}
        if count:
            self._rows = np.memmap(self.path, self._row, "r", shape=(count,))
            new = self._rows["hash"][known:]
            self._places |= {one.tobytes(): place for place, one in enumerate(new, known)}
