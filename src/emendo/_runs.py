"""The folder of a run that can be resumed; its ``run.json`` holds the request and, in the end, the result.

``run.json`` is also the marker by which :mod:`emendo._outputs` tells a training run from an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emendo._outputs import Kind
from emendo._storage import new_file, read_json, write_json
from emendo._version import __version__
from emendo.errors import StorageError

RUN = "run.json"
FORMAT = 1


def has_run(folder: Path) -> bool:
    """Whether a folder holds a run of any kind."""
    return (folder / RUN).is_file()


def read_run(folder: Path, kinds: Kind | tuple[Kind, ...], hint: str) -> dict[str, Any]:
    """Read ``run.json``.

    Args:
        folder: the folder of the run.
        kinds: the kinds of runs that are expected.
        hint: how the message goes on where there is none.

    Raises:
        StorageError: there is no run, or one of another kind, damaged, or of a newer emendo.
    """
    kinds = (kinds,) if isinstance(kinds, Kind) else kinds
    file = folder / RUN
    if not file.exists():
        raise StorageError(f"{folder} holds no {kinds[0].name.split(' ', 1)[1]} {hint}")
    head = read_json(file)
    if not isinstance(head, dict) or not isinstance(head.get("format"), int):
        raise StorageError(f"{file} is damaged: it is not the head of a run.")
    if head["format"] > FORMAT:
        raise StorageError(f"{folder} holds a run of a newer emendo ({head.get('version', 'unknown')}).")
    if not any(kind.is_own(folder) for kind in kinds):
        raise StorageError(f"{folder} holds a run of another command, not {kinds[0].name}.")
    return head


def write_run(folder: Path, head: Mapping[str, Any]) -> None:
    """Write ``run.json``, with the version and the time.

    Raises:
        StorageError: it cannot be written.
    """
    written = datetime.now(UTC).isoformat(timespec="seconds")
    with new_file(folder / RUN) as temporary:
        write_json(temporary, {"format": FORMAT, "version": __version__, "written": written, **head})
