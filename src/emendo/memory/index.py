"""The scopes of the edits in a memory, and the few that a query may be in.

Candidates are found in three ways, each of which takes the same time for any number of edits or little more: by the
names of subjects that stand in the query, by its rare words, and by the nearest subject keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emendo.memory.words import Prompt, rarity

_LONGEST = 12  # words of a name
_SAME_NAME = 32  # candidates of one name, the latest
_COMMON = 500  # edits that a word may stand in, to be looked up
_BY_WORDS = 12
_BY_KEY = 8


@dataclass(frozen=True, slots=True)
class Scope:
    """One way to ask for an edit: its prompt or a paraphrase, with one name of the subject.

    Attributes:
        edit: the number of the edit.
        prompt: the wording.
    """

    edit: int
    prompt: Prompt


class Index:
    """The scopes by row, and the ways to find them.

    Args:
        size: numbers of a key's part; 0 without keys.
    """

    def __init__(self, size: int = 0) -> None:
        self.scopes: list[Scope | None] = []
        self._keys = np.empty((0, 2, size), np.float32)
        self._by_name: dict[tuple[str, ...], list[int]] = {}
        self._by_word: dict[str, list[int]] = {}
        self._rows: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, scopes: Sequence[Scope], keys: NDArray[np.float32] | None = None) -> None:
        """Add the scopes of edits, with their keys ``[scopes, 2, size]``."""
        first = len(self.scopes)
        if keys is not None:
            needed = first + len(scopes)
            if needed > len(self._keys):
                grown = np.empty((max(needed, 2 * len(self._keys), 64), *self._keys.shape[1:]), np.float32)
                grown[:first] = self._keys[:first]
                self._keys = grown
            self._keys[first:needed] = keys
        for row, scope in enumerate(scopes, first):
            self.scopes.append(scope)
            self._rows.setdefault(scope.edit, []).append(row)
            self._by_name.setdefault(scope.prompt.subject[:_LONGEST], []).append(row)
            for word in scope.prompt.known:
                self._by_word.setdefault(word, []).append(row)

    def remove(self, edit: int) -> None:
        """Take the scopes of an edit out."""
        for row in self._rows.pop(edit):
            scope = self.scopes[row]
            assert scope is not None
            self.scopes[row] = None
            _drop(self._by_name, scope.prompt.subject[:_LONGEST], row)
            for word in scope.prompt.known:
                _drop(self._by_word, word, row)

    def key(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """The keys ``[rows, 2, size]``."""
        return self._keys[rows]

    def candidates(self, query: Prompt, key: NDArray[np.float32] | None = None) -> list[int]:
        """The rows of the scopes that a query may be in.

        Args:
            query: the prompt.
            key: its key ``[2, size]``.
        """
        rows = [*self._named(query.words), *self._worded(query), *(() if key is None else self._nearest(key))]
        return [row for row in dict.fromkeys(rows) if self.scopes[row] is not None]

    def _named(self, words: Sequence[str]) -> Iterable[int]:
        for at in range(len(words)):
            for end in range(at + 1, min(len(words), at + _LONGEST) + 1):
                yield from self._by_name.get(tuple(words[at:end]), ())[-_SAME_NAME:]

    def _worded(self, query: Prompt) -> list[int]:
        rare, mass = rarity(), dict[int, float]()
        for word in query.known:
            rows = self._by_word.get(word, ())
            if len(rows) <= _COMMON:
                weight = rare(word)
                for row in rows:
                    mass[row] = mass.get(row, 0.0) + weight
        return sorted(mass, key=mass.__getitem__, reverse=True)[:_BY_WORDS]

    def _nearest(self, key: NDArray[np.float32]) -> list[int]:
        count = len(self.scopes)
        if count == 0:
            return []
        near = self._keys[:count, 0] @ key[0]
        if count > _BY_KEY:
            return [int(row) for row in np.argpartition(near, -_BY_KEY)[-_BY_KEY:]]
        return list(range(count))


def _drop(table: dict[Any, list[int]], key: object, row: int) -> None:
    table[key].remove(row)
    if not table[key]:
        del table[key]
