"""The nearest keys among many: exactly, or in a graph (HNSW) once there are so many that it matters.

The graph is that of usearch (Malkov and Yashunin 2016, arXiv 1603.09320), an optional requirement. It stores the keys
in half precision, is memory-mapped in milliseconds, and takes further keys; it brings no second OpenMP into a process
that runs torch. Among 100,000 keys it finds 0.999 of the eight nearest in half a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from usearch.index import Index

Floats = NDArray[np.float32]
EXACT_UP_TO = 20_000
"""Keys that are compared one by one."""
_LINKS = 16
_WIDTHS: Mapping[str, Any] = {"expansion_add": 64, "expansion_search": 128}


class Nearest(Protocol):
    """Keys of unit length, by row."""

    def find(self, key: Floats, count: int) -> list[int]:
        """The rows of the ``count`` keys with the largest cosine, from the largest down."""

    def extended(self, keys: NDArray[np.floating]) -> Nearest:
        """With further keys ``[n, size]``."""


class Exact:
    """Compares all keys.

    Args:
        keys: ``[n, size]``.
    """

    def __init__(self, keys: NDArray[np.floating]) -> None:
        self._keys = keys.astype(np.float32)

    def find(self, key: Floats, count: int) -> list[int]:
        """See :class:`Nearest`."""
        near = self._keys @ key
        best = np.arange(len(near)) if len(near) <= count else np.argpartition(near, -count)[-count:]
        return [int(row) for row in best[np.argsort(-near[best], kind="stable")]]

    def extended(self, keys: NDArray[np.floating]) -> Nearest:
        """See :class:`Nearest`."""
        return nearest(np.concatenate([self._keys, keys]))


class Graph:
    """Walks a graph of neighbours.

    Args:
        index: of usearch.
        mapped: the file that it is mapped from.
    """

    def __init__(self, index: Index, mapped: Path | None = None) -> None:
        self._index, self._mapped = index, mapped

    @classmethod
    def of(cls, keys: NDArray[np.floating]) -> Graph:
        """Build it."""
        from usearch.index import Index

        empty = Index(ndim=keys.shape[1], metric="ip", dtype="f16", connectivity=_LINKS, **_WIDTHS)
        return cls(empty).extended(keys)

    @classmethod
    def read(cls, file: Path, *, mapped: bool = True) -> Graph:
        """Read a file, memory-mapped or as a whole.

        Raises:
            RuntimeError, OSError: it is missing or damaged.
        """
        from usearch.index import Index

        found = Index.restore(file, view=mapped, **_WIDTHS)
        if found is None:
            raise OSError(f"{file} is no index of usearch")
        return cls(found, file if mapped else None)

    def write(self, file: Path) -> None:
        """Write a file."""
        self._index.save(file)

    def find(self, key: Floats, count: int) -> list[int]:
        """See :class:`Nearest`."""
        return [int(row) for row in self._index.search(key.astype(np.float16), count).keys]

    def extended(self, keys: NDArray[np.floating]) -> Graph:
        """See :class:`Nearest`. A mapped graph is read as a whole; another one takes the keys itself."""
        if self._mapped is not None:
            return Graph.read(self._mapped, mapped=False).extended(keys)
        first = len(self._index)
        self._index.add(
            np.arange(first, first + len(keys), dtype=np.uint64), keys.astype(np.float16), threads=1
        )
        return self


def nearest(keys: NDArray[np.floating]) -> Nearest:
    """A way to find the nearest of some keys ``[n, size]``: a graph for many, where usearch is installed."""
    if len(keys) > EXACT_UP_TO and graphs_are_available():
        return Graph.of(keys)
    return Exact(keys)


def graphs_are_available() -> bool:
    """Whether usearch is installed."""
    try:
        import usearch.index  # noqa: F401
    except ImportError:
        return False
    return True
