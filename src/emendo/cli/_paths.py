"""The paths that a command writes to, kept apart from what it reads; see :mod:`emendo._outputs`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from emendo import _outputs
from emendo._outputs import Kind
from emendo.errors import StorageError

EDITOR = "editor"
"""The folder of the editor in the folder of a training run."""


def claim(
    out: Path | None,
    kind: Kind,
    *,
    model: str | None = None,
    ledger: str | None = None,
    editor: str | None = None,
    inputs: Iterable[str | Path | None] = (),
    overwrite: bool = False,
) -> None:
    """Make sure that a command may write an output, before it begins to work.

    Args:
        out: the output; None is no output.
        kind: its kind.
        model: the model's name or folder; its ledger is protected with it.
        ledger: the ledger, as ``--ledger`` gives it.
        editor: an editor, or the folder of the run that trained it.
        inputs: everything else that the command reads.
        overwrite: replace an older output of the same kind.

    Raises:
        StorageError: the output may not be written.
    """
    if out is None:
        return
    if editor is not None and (Path(editor) / EDITOR / "editor.json").is_file():
        editor = str(Path(editor) / EDITOR)
    read = [*inputs, model, editor, *_ledger_folders(model, ledger)]
    _outputs.claim(out, kind, read, overwrite=overwrite)


def _ledger_folders(model: str | None, ledger: str | None) -> Iterator[Path]:
    """The folders of a model's ledgers that are files on this machine."""
    from emendo.ledger.place import default_folder, find_ledger

    places = [ledger]
    if model is not None:
        with suppress(StorageError, OSError, RuntimeError, ValueError):
            yield default_folder(model)
            places.append(find_ledger(model))
    for place in places:
        if place is not None and "://" not in place:
            yield Path(place)
        elif place is not None and place.startswith("sqlite"):
            yield Path(place.partition(":///")[2].partition("?")[0]).parent
