"""Raw answers as Parquet: one row for each prompt of each record, and one for each edit. The only place with pyarrow.

Numbers are kept as they are (doubles), so that every figure can be worked out again from its rows to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from emendo._storage import new_file
from emendo.data.schema import Record
from emendo.errors import StorageError
from emendo.evaluate.results import Outcome, Result

_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
_MAP = pa.map_(pa.string(), pa.float64())
_EDITS = pa.schema(
    {
        "record": pa.int64(),
        "id": pa.string(),
        "edit": pa.int64(),
        "rank": pa.int64(),
        "norm": pa.float64(),
        "seconds": pa.float64(),
        "norms": _MAP,
        "damage": _MAP,
    }
)

Numbered = tuple[int, Result]
"""A record's place among the records, and its result."""


def write_answers(folder: Path, stem: str, results: Iterable[Numbered]) -> None:
    """Write ``STEM.answers.parquet`` and, after it, ``STEM.edits.parquet``.

    Args:
        folder: where to.
        stem: the beginning of the files' names.
        results: each with its record's place.

    Raises:
        StorageError: they cannot be written.
    """
    kept = list(results)
    prompts: list[dict[str, Any]] = []
    edits: list[dict[str, Any]] = []
    for place, result in kept:
        for outcome in result.outcomes:
            row = {name: getattr(outcome, name) for name in _OUTCOME}
            prompts.append({"record": place, "id": result.record.id, **row})
        edits.append(
            {
                "record": place,
                "id": result.record.id,
                **{name: getattr(result, name) for name in ("edit", "rank", "norm", "seconds")},
                "norms": list(result.norms.items()),
                "damage": list(result.damage.items()),
            }
        )
    _write(folder / f"{stem}answers.parquet", prompts, _answers_schema())
    _write(folder / f"{stem}edits.parquet", edits, _EDITS)


def read_answers(folder: Path, stem: str, records: Sequence[Record]) -> list[Numbered] | None:
    """What :func:`write_answers` wrote, in the same order.

    Args:
        folder: where it is.
        stem: the beginning of the files' names.
        records: all records of the run.

    Returns:
        None where it was not written to its end.

    Raises:
        StorageError: a file is damaged, or is not of these records.
    """
    if not (folder / f"{stem}edits.parquet").exists():
        return None
    outcomes: dict[int, list[Outcome]] = {}
    for row in _read(folder / f"{stem}answers.parquet"):
        place = row.pop("record")
        row.pop("id")
        outcomes.setdefault(place, []).append(Outcome(**row))
    found: list[Numbered] = []
    for row in _read(folder / f"{stem}edits.parquet"):
        place, name = row.pop("record"), row.pop("id")
        if not place < len(records) or records[place].id != name:
            raise StorageError(f"{folder} holds answers of other records than those it was asked for.")
        row |= {key: dict(row[key]) for key in ("norms", "damage")}
        found.append((place, Result(records[place], tuple(outcomes[place]), **row)))
    return found


_OUTCOME = tuple(field.name for field in fields(Outcome))


def _answers_schema() -> pa.Schema:
    """``record``, ``id``, and the fields of an outcome."""
    hints = get_type_hints(Outcome)
    columns = {"record": pa.int64(), "id": pa.string()}
    for name in _OUTCOME:
        plain = next(
            (kind for kind in _TYPES if kind in getattr(hints[name], "__args__", (hints[name],))), str
        )
        columns[name] = _TYPES[plain]
    return pa.schema(columns)


def _write(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    with new_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema), temporary, compression="zstd")


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path} is missing or damaged and cannot be read: {error}") from error
