"""Loading what commands work on, with a word on what takes time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from emendo.cli.console import note, status
from emendo.cli.runs import editor_folder
from emendo.cli.settings import RunSettings
from emendo.data import Record, read_records
from emendo.data.records import RecordSet
from emendo.editors import Editor
from emendo.errors import DataError, RequestError
from emendo.models import BUILT_IN, LM, cache_folder, load

_WORDS = 8  # the fewest words of a passage


def load_model(name: str, dtype: str = "float32", device: str | None = None) -> LM:
    """Load a model; says so when that takes long.

    Raises:
        ModelError: there is no such model.
        RequestError: there is no such device.
    """
    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without that backend
        raise RequestError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if name in BUILT_IN and not (cache_folder() / "models" / name / "config.json").exists():
        note(f"Converting {name} for the first time (about half a minute; kept in {cache_folder()}).")
    with status(f"Loading the model {name}"):
        return load(name, dtype=dtype, device=place)


def load_editor(path: Path, model: str | None, dtype: str, device: str | None) -> tuple[LM, Editor]:
    """An editor, and the model it belongs to.

    Raises:
        StorageError: there is no editor, or it is damaged.
        MismatchError: the model is another one.
    """
    editor = Editor.from_pretrained(editor_folder(path))
    lm = load_model(model or editor.info.get("model_name") or next(iter(BUILT_IN)), dtype, device)
    editor.check(lm)
    return lm, editor.to(lm.device)


def read(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    need_paraphrase: bool = True,
) -> RecordSet:
    """Read records and say how many bad ones were left out.

    Raises:
        DataError: see :func:`emendo.data.read_records`.
    """
    records = read_records(
        source, split=split, limit=limit, skip_bad=skip_bad, need_paraphrase=need_paraphrase
    )
    if bad := records.skipped:
        note(f"{source}: records with {len(bad)} problem(s) were left out, the first: {bad[0]}")
    return records


def training_records(settings: RunSettings) -> tuple[Sequence[Record], Sequence[Record], int]:
    """The records to learn from, those to validate on, and how many problems were skipped.

    Validation records come from ``--validation``; for the built-in facts from their validation split; else they are
    the last 2% of the file (at least 20, at most 100, never more than a fifth), which are then not learnt from.

    Raises:
        DataError: a file is missing, empty or malformed.
    """
    atlas = settings.data == "atlas"
    records = read(
        settings.data, skip_bad=settings.skip_bad, limit=settings.limit, split="train" if atlas else None
    )
    if settings.validation is not None:
        held = read(settings.validation, skip_bad=settings.skip_bad)
        return records, held, len(records.skipped) + len(held.skipped)
    if atlas:
        return records, read("atlas", split="validation", limit=settings.training["validate_on"]), 0
    count = min(max(20, -(-len(records) // 50)), 100, len(records) // 5)
    return records[: len(records) - count], records[len(records) - count :], len(records.skipped)


def passages(path: str | None) -> list[str]:
    """The paragraphs of a plain text file that are long enough to be worth keeping, one a line.

    Raises:
        DataError: the file is missing, or has none.
    """
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path} cannot be read: {error}") from error
    found = [line.strip() for line in lines if len(line.split()) >= _WORDS]
    if not found:
        raise DataError(
            f"--text {path} has no line of at least {_WORDS} words; give plain text, a paragraph a line."
        )
    return found
