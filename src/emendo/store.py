"""Trunk outputs, computed once for each text and kept.

The store is a file of hidden-state rows (bfloat16 by default, memory-mapped) and an index from a text's tokens to
its rows. It belongs to one model and one split; another model's store is another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from emendo.files import new_file
from emendo.packing import Packing
from emendo.texts import Text, TokenBatch, collate, length_buckets
from emendo.trunk import Trunk

_BATCH_TOKENS = 512


class TrunkStore:
    """Keeps ``hidden [tokens, width]`` for every text asked for.

    Args:
        trunk: what computes it.
        folder: where to keep it between runs; None keeps it in memory only.
        dtype: of what is kept. bfloat16 halves the memory; float32 loses nothing.
    """

    def __init__(self, trunk: Trunk, folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.trunk, self.folder, self.dtype = trunk, folder, dtype
        self._chunks: list[Tensor] = []  # each [rows, width]
        self._index: dict[bytes, tuple[int, int]] = {}  # key -> (chunk, first row)
        if folder is not None and folder.is_dir():
            for file in sorted(folder.glob("*.npz")):
                self._read(file)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def model(self) -> nn.Module:
        """The model that the trunk is a part of."""
        return self.trunk.model

    def logits(self, texts: Sequence[Text]) -> tuple[TokenBatch, Tensor]:
        """The texts as one batch, and the logits at its label positions, resumed from what is kept."""
        batch = collate(texts)
        return batch, self.trunk.logits(batch, self.gather(texts))

    def packed(
        self, texts: Sequence[Text], under: Callable[[Packing], AbstractContextManager[None]] | None = None
    ) -> tuple[TokenBatch, Tensor]:
        """The same as :meth:`logits`, without the rows that do not matter (:mod:`emendo.packing`).

        Args:
            texts: the texts.
            under: gives the context in which the model runs.
        """
        batch = collate(texts)
        packing = self.trunk.packing(batch)
        with under(packing) if under is not None else nullcontext():
            return batch, self.trunk.logits(batch, self.gather(texts), packing)

    def over(self, trunk: Trunk) -> TrunkStore:
        """The same kept outputs under another model that shares the frozen part."""
        other = TrunkStore(trunk, dtype=self.dtype)
        other._chunks, other._index = self._chunks, self._index
        return other

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts not yet kept, each once."""
        return list({key: text for text in texts if (key := _key(text)) not in self._index}.values())

    def ensure(self, texts: Iterable[Text], progress: Callable[[int], None] | None = None) -> int:
        """Compute what is missing, in batches of similar length.

        Args:
            texts: what shall be in the store.
            progress: called with the number of texts after each batch.

        Returns:
            How many texts were computed.
        """
        todo = self.missing(texts)
        if not todo:
            return 0
        rows, keys, first = [], [], []
        at = 0
        for part in length_buckets(todo, lambda text: len(text.trunk), _BATCH_TOKENS):
            batch = collate(part)
            hidden = self.trunk.run(batch).to("cpu", self.dtype)
            rows.append(hidden[batch.trunk_mask.bool()])
            for text in part:
                keys.append(_key(text))
                first.append(at)
                at += len(text.trunk)
            if progress is not None:
                progress(len(part))
        self._add(torch.cat(rows), keys, first)
        return len(todo)

    def gather(self, texts: Sequence[Text]) -> Tensor:
        """Hidden states ``[texts, tokens, width]``, padded on the right with zeros, as :func:`collate` pads."""
        length = max(len(text.trunk) for text in texts)
        width = self._chunks[0].shape[-1]
        out = torch.zeros(len(texts), length, width, dtype=self.dtype)
        for row, text in zip(out, texts, strict=True):
            chunk, first = self._index[_key(text)]
            count = len(text.trunk)
            row[:count] = self._chunks[chunk][first : first + count]
        return out

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
        chunk = len(self._chunks)
        self._chunks.append(rows)
        self._index.update((key, (chunk, at)) for key, at in zip(keys, first, strict=True))


def _key(text: Text) -> bytes:
    """16 bytes that stand for what the model reads of the text."""
    return hashlib.blake2b(np.asarray(text.trunk, np.int32).tobytes(), digest_size=16).digest()
