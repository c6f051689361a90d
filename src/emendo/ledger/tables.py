"""The ledger's tables as the store asks them. What the database itself knows of them is made in ``migrations``."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Boolean, Dialect, Integer, LargeBinary, String, Text, column, table
from sqlalchemy.types import TypeDecorator

from emendo.errors import StorageError


class Json(TypeDecorator[Any]):
    """JSON as text, alike on every database; a figure may be infinite or not a number, which theirs forbids."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """To text."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """From text."""
        try:
            return None if value is None else json.loads(value)
        except ValueError as error:
            raise StorageError(f"The ledger is damaged: {value!r:.80} is no JSON ({error}).") from error


class JsonTuple(Json):
    """A JSON list, read as a tuple."""

    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """From text."""
        return tuple(super().process_result_value(value, dialect))


about = table(
    "about",
    column("ledger", String),
    column("fingerprint", String),
    column("model", String),
    column("created", String),
)
payloads = table("payloads", column("digest", String), column("data", LargeBinary))
edits = table(
    "edits",
    column("id", Integer),
    column("digest", String),
    column("editor", String),
    column("version", String),
    column("requests", JsonTuple),
    column("made", String),
    column("upon", JsonTuple),
    column("bytes", Integer),
    column("rank", Integer),
    column("card", Json),
)
operations = table(
    "operations",
    column("id", Integer),
    column("parent", Integer),
    column("kind", String),
    column("edits", JsonTuple),
    column("active", JsonTuple),
    column("at", String),
    column("by", String),
    column("note", String),
    column("forced", Boolean),
    column("health", Json),
)
tags = table(
    "tags", column("name", String), column("operation", Integer), column("at", String), column("by", String)
)
checks = table(
    "checks",
    column("id", Integer),
    column("operation", Integer),
    column("at", String),
    column("figures", Json),
)
