"""An inverted index: the rows in which a word or a name stands, as sorted arrays that can be memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Rows = NDArray[np.uint32]


def hashed(texts: Sequence[str]) -> Hashes:
    """The texts as numbers of 64 bits, the same ones in every process."""
    data = b"".join(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts
    )
    return np.frombuffer(data, "<u8").astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Postings:
    """Pairs of a hash and a row, in ascending order.

    Attributes:
        hashes: ``[pairs]``.
        rows: ``[pairs]``.
    """

    hashes: Hashes
    rows: Rows

    @classmethod
    def empty(cls) -> Postings:
        """No pairs."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint32))

    def extended(self, hashes: Hashes, rows: Rows) -> Postings:
        """With further pairs, whose rows come after those that are there."""
        order = np.lexsort((rows, hashes))
        hashes, rows = hashes[order], rows[order]
        places = np.searchsorted(self.hashes, hashes, "right")
        return Postings(np.insert(self.hashes, places, hashes), np.insert(self.rows, places, rows))

    def find(self, hashes: Hashes) -> list[Rows]:
        """The rows of each hash, ascending."""
        if not len(self.hashes):
            return [self.rows] * len(hashes)
        starts, ends = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        return [self.rows[start:end] for start, end in zip(starts, ends, strict=True)]
