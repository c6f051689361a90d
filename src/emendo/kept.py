"""Rows of numbers for each text, computed once and kept, in memory or in the files of a folder.

A file ``NAME.bin`` holds rows, memory-mapped; ``NAME.npz`` beside it says whose they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from emendo.files import new_file
from emendo.texts import Text, length_buckets

_BATCH_TOKENS = 512


class Kept:
    """Keeps ``[rows, width]`` for every text that was asked for.

    Args:
        reads: what the rows of a text depend on; texts that share it share their rows.
        count: how many rows a text has.
        dtype: of what is kept.
        folder: where to keep it between runs; None keeps it in memory only.
    """

    def __init__(
        self,
        reads: Callable[[Text], Sequence[int]],
        count: Callable[[Text], int],
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.reads, self.count, self.dtype, self.folder = reads, count, dtype, folder
        self.chunks: list[Tensor] = []  # each [rows, width]
        self._index: dict[bytes, tuple[int, int]] = {}  # key -> (chunk, first row)
        if folder is not None and folder.is_dir():
            for file in sorted(folder.glob("*.npz")):
                self._read(file)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, text: Text) -> Tensor:
        """The rows of a text that is kept, ``[rows, width]``."""
        chunk, first = self._index[self._key(text)]
        return self.chunks[chunk][first : first + self.count(text)]

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts not yet kept, each once."""
        return list({key: text for text in texts if (key := self._key(text)) not in self._index}.values())

    def ensure(
        self,
        texts: Iterable[Text],
        compute: Callable[[Sequence[Text]], Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Compute what is missing, in batches of similar length.

        Args:
            texts: what shall be kept.
            compute: some texts to the rows of all of them, one after the other.
            progress: called with the number of texts after each batch.

        Returns:
            How many texts were computed.
        """
        todo = self.missing(texts)
        if not todo:
            return 0
        rows, keys, first = [], [], []
        at = 0
        for part in length_buckets(todo, lambda text: text.size, _BATCH_TOKENS):
            rows.append(compute(part).to("cpu", self.dtype))
            for text in part:
                keys.append(self._key(text))
                first.append(at)
                at += self.count(text)
            if progress is not None:
                progress(len(part))
        self._add(torch.cat(rows), keys, first)
        return len(todo)

    def _key(self, text: Text) -> bytes:
        return hashlib.blake2b(np.asarray(self.reads(text), np.int32).tobytes(), digest_size=16).digest()

    def _add(self, rows: Tensor, keys: list[bytes], first: list[int]) -> None:
        if self.folder is not None:
            name = hashlib.blake2b(b"".join(keys), digest_size=8).hexdigest()
            data, index = self.folder / f"{name}.bin", self.folder / f"{name}.npz"
            with new_file(data) as temporary:
                rows.contiguous().view(torch.uint8).numpy().tofile(temporary)
            with new_file(index) as temporary, temporary.open("wb") as handle:
                np.savez(
                    handle,
                    keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
                    first=np.asarray(first),
                    shape=np.asarray(rows.shape),
                )
            self._read(index)
        else:
            self._keep(rows, keys, first)

    def _read(self, index: Path) -> None:
        """Take in one file; one that is damaged or of another dtype is as good as absent: it is made anew."""
        data = index.with_suffix(".bin")
        try:
            with index.open("rb") as handle, np.load(handle) as file:
                keys, first, (count, width) = file["keys"], file["first"], file["shape"].tolist()
            whole = data.stat().st_size == count * width * self.dtype.itemsize
        except (OSError, EOFError, KeyError, ValueError, BadZipFile):
            return
        if whole:
            rows = torch.from_file(str(data), shared=False, size=count * width, dtype=self.dtype)
            self._keep(rows.view(count, width), [key.tobytes() for key in keys], first.tolist())

    def _keep(self, rows: Tensor, keys: list[bytes], first: list[int]) -> None:
        chunk = len(self.chunks)
        self.chunks.append(rows)
        self._index.update((key, (chunk, at)) for key, at in zip(keys, first, strict=True))
