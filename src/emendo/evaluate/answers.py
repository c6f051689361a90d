"""Raw answers as Parquet: one row for each prompt of each record, and one for each edit. The only module with pyarrow.

Numbers are kept as doubles, so that every figure can be computed again from its rows to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from emendo._storage import new_file
from emendo.data.schema import Record
from emendo.errors import StorageError
from emendo.evaluate.results import Kind, Outcome, Result

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
"""The number of a record, from 0, and its result."""


def write_answers(folder: Path, stem: str, results: Iterable[Numbered]) -> None:
    """Write ``STEM.answers.parquet`` and, after it, ``STEM.edits.parquet``.

    Args:
        folder: of the files.
        stem: the beginning of their names.
        results: the results with the numbers of their records.

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
    """The results that :func:`write_answers` wrote, in the same order.

    Args:
        folder: of the files.
        stem: the beginning of their names.
        records: all records of the run.

    Returns:
        None where the files were not written completely.

    Raises:
        StorageError: a file is damaged, or has answers of other records.
    """
    if not (folder / f"{stem}edits.parquet").exists():
        return None
    files = [folder / f"{stem}{name}.parquet" for name in ("answers", "edits")]
    answers, edits = _read(files[0], _answers_schema()), _read(files[1], _EDITS)
    outcomes: dict[int, list[Outcome]] = {}
    found: list[Numbered] = []
    try:
        for row in answers:
            place = row.pop("record")
            row.pop("id")
            outcomes.setdefault(place, []).append(_outcome(row))
        for row in edits:
            place, name = row.pop("record"), row.pop("id")
            if not 0 <= place < len(records) or records[place].id != name:
                raise StorageError(f"{folder} holds answers of other records than records.jsonl.")
            row |= {key: dict(row[key]) for key in ("norms", "damage")}
            found.append((place, Result(records[place], tuple(outcomes[place]), **row)))
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{files[0]} or {files[1].name} is damaged: {error!r}") from error
    return found


def _outcome(row: dict[str, Any]) -> Outcome:
    """A row as an outcome.

    Raises:
        ValueError: a value is missing, or the kind is unknown.
    """
    missing = [name for name in _REQUIRED if row.get(name) is None]
    if missing or row["kind"] not in get_args(Kind):
        raise ValueError(f"a prompt of kind {row.get('kind')!r} without {', '.join(missing) or 'known kind'}")
    return Outcome(**row)


_OUTCOME = tuple(field.name for field in fields(Outcome))
_REQUIRED = tuple(f.name for f in fields(Outcome) if f.default is MISSING and f.name != "generated")


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


def _read(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """The rows of a file, with the columns of the schema that it has.

    Raises:
        StorageError: the file is missing, damaged, or has columns of other types.
    """
    if not path.is_file():
        raise StorageError(f"{path} is missing, or is not a regular file; measure again with --overwrite.")
    try:
        table = pq.read_table(path)
        known = [field for field in schema if field.name in table.schema.names]
        return table.select([f.name for f in known]).cast(pa.schema(known)).to_pylist()  # type: ignore[no-any-return]
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{path} is damaged and cannot be read: {reason}") from error
