"""The rows of the ledger's tables as frozen dataclasses. A table's columns are the fields of its class.

Every value is checked when it is read: one that the column cannot hold is a :class:`StorageError` that names the
column. The database's own definitions (keys, indexes) are made by :mod:`emendo.ledger._migrations`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Final, TypeAlias, get_type_hints

from sqlalchemy import (
    Boolean,
    Dialect,
    Integer,
    LargeBinary,
    String,
    TableClause,
    Text,
    column,
    insert,
    table,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

from emendo.errors import StorageError

Requests: TypeAlias = tuple[Mapping[str, Any], ...]
"""Requests of an edit as JSON objects, each with the texts ``prompt`` and ``target``, and often ``separator``."""
Values: TypeAlias = Mapping[str, Any]
"""A JSON object."""

State: TypeAlias = int | str
"""The number of an operation, as a number or as text; the name of a tag; or ``"head"``, the latest operation."""


@dataclass(frozen=True, slots=True)
class NewEntry:
    """The description of an edit that is about to be applied.

    Attributes:
        editor: name of the editing method.
        version: version of emendo that made the edit.
        requests: JSON objects such as ``{"prompt": ..., "target": ...}``, with the ``separator`` where one was given.
        made: time of creation, ISO 8601 in UTC.
        upon: the edits that were active in the model while this one was computed: their digests, or one reference
            ``"LEDGER-ID@OPERATION"`` to a state of a ledger.
        rank: the highest rank among the edited matrices.
        card: figures to keep with the edit, as JSON values.
        chat: whether the prompts were put into the model's chat template.
    """

    editor: str
    version: str
    requests: Requests
    made: str
    upon: tuple[str, ...] = ()
    rank: int | None = None
    card: Values = field(default_factory=dict)
    chat: bool = False


class _Row:
    """A class whose fields are the columns of a table."""

    columns: ClassVar[TableClause]

    @classmethod
    def _names(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.compare]  # type: ignore[arg-type]  # every row is a dataclass

    def insert(self) -> Any:
        """The statement that stores this row."""
        return insert(self.columns).values({name: getattr(self, name) for name in self._names()})

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {name: getattr(self, name) for name in self._names()}


@dataclass(frozen=True, slots=True)
class About(_Row):
    """The ledger itself: the one row of its table.

    Attributes:
        ledger: its id, a UUID; a copy of the file has the same one.
        fingerprint: fingerprint of the model.
        model: the name or folder that the model was loaded from.
        created: time, ISO 8601 in UTC.
    """

    ledger: str
    fingerprint: str
    model: str
    created: str


@dataclass(frozen=True, slots=True)
class Payload(_Row):
    """The bytes of an edit, by their SHA-256 in hex."""

    digest: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Entry(_Row):
    """An edit that was applied at least once, active or not. It has the fields of :class:`NewEntry` and these.

    Attributes:
        id: its number, counted from 1; it never changes.
        digest: SHA-256 of its bytes, in hex.
        bytes: their number.
    """

    id: int
    digest: str
    editor: str
    version: str
    requests: Requests
    made: str
    upon: tuple[str, ...]
    bytes: int
    rank: int | None
    card: Values
    chat: bool


@dataclass(frozen=True, slots=True)
class Prompt(_Row):
    """A prompt of an edit, so that edits of one fact are found.

    Attributes:
        edit: number of the edit.
        digest: hash of the normalised prompt.
    """

    edit: int
    digest: str


@dataclass(frozen=True)
class Operation(_Row):
    """One step of the ledger.

    Attributes:
        id: its number; 0 is the beginning, with no active edit.
        parent: number of the operation before; None at the beginning.
        kind: ``begin``, ``apply``, ``undo``, ``revert`` or ``checkout``.
        edits: numbers of the edits that it activated or deactivated.
        active_count: number of edits active after it.
        at: time, ISO 8601 in UTC.
        by: name of the user.
        note: the user's comment.
        forced: whether the edit was applied although the guard refused it.
        health: the guard's figures, as JSON values; None if nothing was measured.
    """

    id: int
    parent: int | None
    kind: str
    edits: tuple[int, ...]
    active_count: int
    at: str
    by: str
    note: str
    forced: bool
    health: Values | None
    read_active: Callable[[int], tuple[int, ...]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def active(self) -> tuple[int, ...]:
        """Numbers of the edits active after it, in the order in which they were applied; read on first use."""
        return () if self.read_active is None else self.read_active(self.id)

    def as_dict(self) -> dict[str, Any]:
        """The operation as JSON values, with the active edits."""
        values: dict[str, Any] = {}
        for name, value in _Row.as_dict(self).items():
            values |= {"active": self.active} if name == "active_count" else {name: value}
        return values


@dataclass(frozen=True, slots=True)
class Period(_Row):
    """A time during which an edit is active.

    Attributes:
        edit: number of the edit.
        position: its place among the active edits, which are applied in the order of their positions.
        since: the operation that activated it.
        until: the operation that deactivated it; None while it is active.
        scope: of an edit in the memory, further evidence of the prompts that it answers, as JSON values (``subject``,
            ``paraphrases``, ``aliases``); None for an edit in the weights.
    """

    edit: int
    position: int
    since: int
    until: int | None
    scope: Values | None = None

    def covers(self, operation: int) -> bool:
        """Whether the edit was active after an operation."""
        return self.since <= operation and (self.until is None or self.until > operation)


@dataclass(frozen=True, slots=True)
class Tag(_Row):
    """A permanent name for the state after an operation."""

    name: str
    operation: int
    at: str
    by: str


@dataclass(frozen=True, slots=True)
class Check(_Row):
    """Figures of all active edits together, measured after an operation."""

    id: int
    operation: int
    at: str
    figures: Values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_request(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("prompt", "target"))
        and isinstance(value.get("separator"), str | None)
    )


def _is_list(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True)
class _Kind:
    """How values of one Python type are stored: the column's type, a check, and whether they are JSON text."""

    type: TypeEngine[Any]
    check: Callable[[Any], bool]
    json: bool = False


_KINDS: Final[Mapping[Any, _Kind]] = {
    int: _Kind(Integer(), _is_int),
    str: _Kind(String(), _is_text),
    bool: _Kind(Boolean(), lambda value: isinstance(value, bool)),
    bytes: _Kind(LargeBinary(), lambda value: isinstance(value, bytes)),
    tuple[int, ...]: _Kind(Text(), _is_list(_is_int), json=True),
    tuple[str, ...]: _Kind(Text(), _is_list(_is_text), json=True),
    Requests: _Kind(Text(), _is_list(_is_request), json=True),
    Values: _Kind(Text(), _is_object, json=True),
}


class _Checked(TypeDecorator[Any]):
    """A column whose values are checked when they are read. JSON is text: it may hold NaN and infinity."""

    impl = Text
    cache_ok = True

    def __init__(self, name: str, hint: Any) -> None:
        super().__init__()
        self.name, self.hint = name, hint
        self._optional = type(None) in getattr(hint, "__args__", ())
        self._kind = next(kind for plain, kind in _KINDS.items() if hint in (plain, plain | None))

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """The type of the column in the database."""
        return dialect.type_descriptor(self._kind.type)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """The value to store."""
        return json.dumps(value) if self._kind.json and value is not None else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """The stored value, checked."""
        if value is None and self._optional:
            return None
        found = bytes(value) if isinstance(value, memoryview) else value
        try:
            if self._kind.json:
                found = json.loads(found)
            if not self._kind.check(found):
                raise TypeError("a value of another type was expected")
        except (TypeError, ValueError, RecursionError) as error:
            raise StorageError(
                f"The ledger is damaged: {self.name} holds {value!r:.80} ({error!s:.80}). Restore a copy of it."
            ) from error
        return tuple(found) if isinstance(found, list) else found


def _table(name: str, row: type[_Row]) -> TableClause:
    hints = get_type_hints(row)
    row.columns = table(name, *(column(f, _Checked(f"{name}.{f}", hints[f])) for f in row._names()))
    return row.columns


about = _table("about", About)
payloads = _table("payloads", Payload)
edits = _table("edits", Entry)
prompts = _table("prompts", Prompt)
operations = _table("operations", Operation)
periods = _table("periods", Period)
tags = _table("tags", Tag)
checks = _table("checks", Check)
