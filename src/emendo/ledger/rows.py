"""What the ledger's tables hold, one class for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What the ledger is told about an edit before it has a number.

    Attributes:
        editor: the name of the method that made it.
        version: of emendo, when it was made.
        requests: what was asked, as JSON objects such as ``{"prompt": ..., "target": ...}``.
        made: when, ISO 8601 in UTC.
        upon: digests of the edits that stood in the model while it was made.
        rank: the highest among its sites; None for an edit that changes no weights.
        card: figures that its maker wanted to keep, as JSON values.
    """

    editor: str
    version: str
    requests: tuple[Mapping[str, Any], ...]
    made: str
    upon: tuple[str, ...] = ()
    rank: int | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """An edit that the ledger knows, active or not. Beside the fields of :class:`NewEntry` it has these.

    Attributes:
        id: its number, from 1; it keeps it for good.
        digest: the SHA-256 of its bytes, in hex.
        bytes: how many they are.
    """

    id: int
    digest: str
    editor: str
    version: str
    requests: tuple[Mapping[str, Any], ...]
    made: str
    upon: tuple[str, ...]
    bytes: int
    rank: int | None
    card: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of the ledger, and the state after it.

    Attributes:
        id: its number: 0 is the beginning, with no edit active.
        parent: the number of the step before; None at the beginning.
        kind: ``begin``, ``apply``, ``undo``, ``revert`` or ``checkout``.
        edits: numbers of the edits that it put on or took off.
        active: numbers of the edits active after it, in the order in which they were put on.
        at: when, ISO 8601 in UTC.
        by: who.
        note: why, in that person's words.
        forced: whether it was done although the guard refused it.
        health: the guard's figures, as JSON values; None if nothing was measured.
    """

    id: int
    parent: int | None
    kind: str
    edits: tuple[int, ...]
    active: tuple[int, ...]
    at: str
    by: str
    note: str
    forced: bool
    health: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Tag:
    """A name for the state after an operation; it is given once."""

    name: str
    operation: int
    at: str
    by: str


@dataclass(frozen=True, slots=True)
class Check:
    """Figures of the whole stack of active edits, measured after an operation."""

    id: int
    operation: int
    at: str
    figures: Mapping[str, Any]
