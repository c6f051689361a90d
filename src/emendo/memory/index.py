"""The scopes of the edits in a memory, and the few that a query may be in.

Candidates are found in three ways, each of which takes the same time for any number of edits or little more: by the
names of subjects that stand in the query, by its rare words, and by the nearest subject keys. The scopes that were
added last are looked up in tables; when there are many of them they go into a
:class:`~emendo.memory.segment.Segment`, which a folder can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emendo.errors import StorageError
from emendo.memory.postings import Postings, hashed
from emendo.memory.segment import LONGEST_NAME, Scope, Segment, name_of
from emendo.memory.words import Prompt, rarity

__all__ = ["Index", "Scope"]

_SAME_NAME = 32  # candidates of one name, the latest
_COMMON = 500  # edits that a word may stand in, to be looked up
_BY_WORDS = 12
_BY_KEY = 8
_RECENT = 4096  # scopes in the tables, at least, before they go into the segment
_MOST_RECENT = 20_000
_PROMPTS = 4096  # that are kept as they were read


class Index:
    """The scopes by row, and the ways to find them.

    Args:
        size: numbers of a key's part; 0 without keys.
        folder: of the segment's file; what stands in it is read. None keeps everything in memory.
    """

    def __init__(self, size: int = 0, folder: Path | None = None) -> None:
        self.size, self._folder = size, folder
        self._segment = Segment.empty(size)
        if folder is not None:
            with suppress(StorageError):  # it is made again
                self._segment = Segment.read(folder, size)
        self._is_written = True
        self._in_force = np.ones(len(self._segment), np.bool_)
        self._numbers = set(self._segment.edits.tolist())
        self._prompts: dict[int, Prompt] = {}
        self._begin_tables()

    def _begin_tables(self) -> None:
        self._recent: list[Scope | None] = []
        self._keys = np.empty((64, 2, self.size), np.float32)
        self._by_name: dict[int, list[int]] = {}
        self._by_word: dict[int, list[int]] = {}
        self._rows: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def numbers(self) -> Set[int]:
        """The numbers of the edits."""
        return self._numbers

    # ------------------------------------------------------------------------------------------ changes

    def add(self, scopes: Sequence[Scope], keys: NDArray[np.float32] | None = None) -> None:
        """Add the scopes of edits, all those of an edit at once, with their keys ``[scopes, 2, size]``."""
        if not scopes:
            return
        if keys is None:
            keys = np.empty((len(scopes), 2, 0), np.float32)
        if len(self._recent) + len(scopes) > self._room:
            self._pack(scopes, keys)
        else:
            self._enter(scopes, keys)
        self._numbers |= {scope.edit for scope in scopes}

    @property
    def _room(self) -> int:
        """Scopes that the tables may hold."""
        return min(max(_RECENT, len(self._segment) // 8), _MOST_RECENT)

    def _enter(self, scopes: Sequence[Scope], keys: NDArray[np.float32]) -> None:
        """Add scopes to the tables."""
        first = len(self._recent)
        needed = first + len(scopes)
        if needed > len(self._keys):
            grown = np.empty((max(needed, 2 * len(self._keys)), *self._keys.shape[1:]), np.float32)
            grown[:first] = self._keys[:first]
            self._keys = grown
        self._keys[first:needed] = keys
        for row, scope in enumerate(scopes, len(self._segment) + first):
            self._recent.append(scope)
            self._rows.setdefault(scope.edit, []).append(row)
            name, *words = _hashes(scope)
            self._by_name.setdefault(name, []).append(row)
            for word in words:
                self._by_word.setdefault(word, []).append(row)

    def _pack(self, scopes: Sequence[Scope], keys: NDArray[np.float32]) -> None:
        """Move the scopes of the tables, and further ones, into the segment; rows change."""
        recent = [place for place, scope in enumerate(self._recent) if scope is not None]
        some = [scope for scope in self._recent if scope is not None]
        keys = np.concatenate([self._keys[recent], keys])
        segment = self._segment
        if 2 * np.count_nonzero(self._in_force) < len(segment):
            kept = np.flatnonzero(self._in_force)
            old = [
                Scope(self.edit(row), segment.prompt(row), int(segment.marks[row])) for row in kept.tolist()
            ]
            segment = Segment.empty(self.size).extended(old, segment.keys[kept].astype(np.float32))
            self._in_force = np.ones(len(old), np.bool_)
        self._segment = segment.extended([*some, *scopes], keys)
        added = len(self._segment) - len(self._in_force)
        self._in_force = np.concatenate([self._in_force, np.ones(added, np.bool_)])
        self._is_written = False
        self._prompts.clear()
        self._begin_tables()

    def remove(self, edit: int) -> None:
        """Take the scopes of an edit out."""
        self._numbers.remove(edit)
        if edit not in self._rows:  # an edit is in one of both places
            self._in_force[self._segment.edits == edit] = False
        for row in self._rows.pop(edit, ()):
            place = row - len(self._segment)
            scope = self._recent[place]
            assert scope is not None
            self._recent[place] = None
            self._keys[place] = 0  # near nothing
            name, *words = _hashes(scope)
            _drop(self._by_name, name, row)
            for word in words:
                _drop(self._by_word, word, row)

    def keep(self, marks: Mapping[int, int]) -> None:
        """Leave only those edits in force that have the given marks; of an index that was just read."""
        numbers = np.array(list(marks), np.int64)
        order = np.argsort(numbers)
        wanted = np.array(list(marks.values()), np.uint64)[order]
        numbers, edits = numbers[order], self._segment.edits
        places = np.searchsorted(numbers, edits).clip(max=len(numbers) - 1) if len(numbers) else edits
        same = np.zeros(len(edits), np.bool_)
        if len(numbers):
            same = (numbers[places] == edits) & (wanted[places] == self._segment.marks)
        self._in_force = same
        self._numbers = set(edits[same].tolist())

    def write(self) -> None:
        """Write the segment's file, if it has one and is not in it yet; where it cannot be written, none is kept."""
        if self._folder is None or self._is_written:
            return
        with suppress(StorageError):
            self._segment = self._segment.write(self._folder)
        self._is_written = True

    # ------------------------------------------------------------------------------------------ looking up

    def edit(self, row: int) -> int:
        """The number of a row's edit."""
        if row < len(self._segment):
            return int(self._segment.edits[row])
        return self._scope(row).edit

    def prompt(self, row: int) -> Prompt:
        """The wording of a row."""
        if row >= len(self._segment):
            return self._scope(row).prompt
        if row not in self._prompts:
            if len(self._prompts) >= _PROMPTS:
                self._prompts.clear()
            self._prompts[row] = self._segment.prompt(row)
        return self._prompts[row]

    def _scope(self, row: int) -> Scope:
        scope = self._recent[row - len(self._segment)]
        assert scope is not None
        return scope

    def key(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """The keys ``[rows, 2, size]``."""
        count = len(self._segment)
        return np.stack(
            [
                self._segment.keys[row].astype(np.float32) if row < count else self._keys[row - count]
                for row in rows
            ]
        )

    def candidates(self, query: Prompt, key: NDArray[np.float32] | None = None) -> list[int]:
        """The rows of the scopes that a query may be in.

        Args:
            query: the prompt.
            key: its key ``[2, size]``.
        """
        rows = [
            *self._named(query.words),
            *self._worded(query),
            *(() if key is None else self._nearest(key[0])),
        ]
        return list(dict.fromkeys(rows))

    def _named(self, words: Sequence[str]) -> Iterator[int]:
        names = dict.fromkeys(
            name_of(words[at:end])
            for at in range(len(words))
            for end in range(at + 1, min(len(words), at + LONGEST_NAME) + 1)
        )
        for rows in self._find(self._segment.names, self._by_name, [*names]):
            yield from rows[-_SAME_NAME:].tolist()

    def _worded(self, query: Prompt) -> list[int]:
        rare, known = rarity(), sorted(query.known)
        found = self._find(self._segment.words, self._by_word, known, _COMMON)
        some = [(rows, rare(word)) for rows, word in zip(found, known, strict=True) if len(rows)]
        if not some:
            return []
        every, places = np.unique(np.concatenate([rows for rows, _ in some]), return_inverse=True)
        mass = np.bincount(places, np.concatenate([np.full(len(rows), weight) for rows, weight in some]))
        return [int(row) for row in every[np.lexsort((-every, -mass))[:_BY_WORDS]]]

    def _find(
        self,
        postings: Postings,
        table: Mapping[int, list[int]],
        texts: Sequence[str],
        most: int | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """The rows in force of each of some texts, ascending; none of a text that has more than ``most``."""
        hashes = hashed(texts)
        for hash, rows in zip(hashes.tolist(), postings.find(hashes), strict=True):
            late = table.get(hash, ())
            if most is not None and len(rows) + len(late) > most:
                yield np.empty(0, np.int64)
            else:
                yield np.concatenate([rows[self._in_force[rows]], late]).astype(np.int64)

    def _nearest(self, key: NDArray[np.float32]) -> list[int]:
        segment, recent = self._segment, len(self._recent)
        found, asked = list[int](), _BY_KEY
        while segment.near is not None and len(found) < min(_BY_KEY, len(segment)) and asked:
            found = [row for row in segment.near.find(key, asked) if self._in_force[row]]
            asked = 4 * asked if asked < len(segment) else 0  # some were out of force
        late = self._keys[:recent, 0] @ key
        best = range(recent) if recent <= _BY_KEY else np.argpartition(late, -_BY_KEY)[-_BY_KEY:].tolist()
        found = found[:_BY_KEY] + [row + len(segment) for row in best if self._recent[row] is not None]
        if len(found) <= _BY_KEY:
            return found
        near = self.key(found)[:, 0] @ key
        return [found[place] for place in np.argsort(-near, kind="stable")[:_BY_KEY]]


def _hashes(scope: Scope) -> list[int]:
    """The hash of the subject's name, and those of the words."""
    return [int(one) for one in hashed([name_of(scope.prompt.subject), *sorted(scope.prompt.known)])]


def _drop(table: dict[int, list[int]], key: int, row: int) -> None:
    table[key].remove(row)
    if not table[key]:
        del table[key]
