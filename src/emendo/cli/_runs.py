"""The folder of a training run.

::

    DIR/run.json                 what was asked, and in the end what came of it
        checkpoint.safetensors   the whole state, renewed every minute (see emendo.train.checkpoint)
        history.json             figures on the way
        editor/                  the trained editor
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emendo._storage import new_file, read_json, write_json
from emendo._version import __version__
from emendo.cli._settings import RunSettings
from emendo.data import Record
from emendo.editors import Editor
from emendo.errors import RequestError, StorageError
from emendo.train.checkpoint import FILE as CHECKPOINT

FORMAT = 1
EDITOR = "editor"
_OWN = ("run.json", CHECKPOINT, "history.json", EDITOR)
_PATHS = ("model", "data", "validation", "text")


@dataclass(frozen=True)
class Run:
    """A training run and its folder.

    Attributes:
        folder: where it is kept.
        settings: what was asked.
        options: the same as the command's options, those that were given or have a default.
        command: the command that began it.
        data: digest of the records, once they have been read.
        result: what came of it, once it has finished.
        resuming: it goes on from an earlier session.
    """

    folder: Path
    settings: RunSettings
    options: Mapping[str, Any]
    command: str = "train"
    data: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    resuming: bool = False

    @property
    def editor(self) -> Path:
        """Where the trained editor is, or will be."""
        return self.folder / EDITOR

    @property
    def finished(self) -> bool:
        """Whether the editor is there."""
        return bool(self.result) and (self.editor / "editor.json").exists()

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.folder / CHECKPOINT).exists()

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read the run that a folder holds.

        Raises:
            StorageError: it holds none, or one that this version cannot read.
        """
        if not (folder / "run.json").exists():
            raise StorageError(f"{folder} holds no training run to resume; start one without --resume.")
        head = read_json(folder / "run.json")
        try:
            if head["format"] > FORMAT:
                raise StorageError(f"{folder} holds a run of a newer emendo ({head['version']}).")
            settings, options = RunSettings(**head["settings"]), head["options"]
            return cls(folder, settings, options, head["command"], head["data"], head["result"], True)
        except (KeyError, TypeError) as error:
            raise StorageError(f"{folder / 'run.json'} is damaged: {error}") from error

    def write(self) -> None:
        """Write ``run.json``.

        Raises:
            StorageError: it cannot be written.
        """
        with new_file(self.folder / "run.json") as temporary:
            head = {"format": FORMAT, "version": __version__, "command": self.command, "data": self.data}
            head |= {
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "options": dict(self.options),
            }
            write_json(temporary, {**head, "settings": asdict(self.settings), "result": dict(self.result)})

    def begin(self, records: Iterable[Record]) -> Run:
        """Claim the folder for a new run, in place of an older one; or make sure that the old one can go on.

        Raises:
            StorageError: the data of the run that shall go on have changed, or the folder cannot be written.
        """
        data = digest(records)
        if self.resuming:
            if data != self.data:
                raise StorageError(
                    f"The records of {self.settings.data} are not those that {self.folder} was started with, so it "
                    "cannot go on as the same run. Start anew with --overwrite."
                )
            return self
        clear(self.folder)
        run = replace(self, data=data)
        run.write()
        return run

    def finish(self, editor: Editor, history: list[dict[str, float]], result: Mapping[str, Any]) -> Run:
        """Save the editor and what came of the run.

        Raises:
            StorageError: something cannot be written; the checkpoint is still there.
        """
        editor.save_pretrained(self.editor, overwrite=True)
        with new_file(self.folder / "history.json") as temporary:
            write_json(temporary, history)
        run = replace(self, result=result)
        run.write()
        return run


def new_run(folder: Path, options: Mapping[str, Any], *, overwrite: bool, command: str = "train") -> Run:
    """A run that is to begin.

    Raises:
        StorageError: the folder already holds something.
        RequestError: an option that makes no sense.
    """
    refuse_occupied(folder, "run.json", overwrite=overwrite, hint="--overwrite, or go on with it by --resume")
    settings = RunSettings.from_options(options)
    places = {name: getattr(settings, name) for name in _PATHS if options.get(name) is not None}
    plain = {name: value for name, value in options.items() if value is not None}
    return Run(folder, settings, {**plain, **places}, command)


def resumed_run(folder: Path, given: Mapping[str, Any]) -> Run:
    """A run that is to go on.

    Args:
        folder: where it is.
        given: options that the user gave again; they must say what they said before.

    Raises:
        StorageError: there is no run in the folder.
        RequestError: an option differs.
    """
    run = Run.open(folder)
    before = RunSettings.from_options(run.options)
    for name, value in given.items():
        if RunSettings.from_options({**run.options, name: value}) != before:
            raise RequestError(
                f"{folder} was started with another {name.replace('_', '-')} ({run.options.get(name, 'the default')} "
                f"then, {value} now). Leave the option out to resume, or start anew with --overwrite."
            )
    return run


def refuse_occupied(folder: Path, marker: str, *, overwrite: bool, hint: str = "--overwrite") -> None:
    """Make sure that a command may write to a folder.

    Args:
        folder: where it shall write.
        marker: a file that tells that what is there was written by the same command.
        overwrite: the user allows that to be replaced.
        hint: what the user can do.

    Raises:
        StorageError: the folder holds something that may not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / marker).exists():
        raise StorageError(f"{folder} already holds something that is not emendo's; choose another --out.")
    if not overwrite:
        raise StorageError(
            f"{folder} already holds something; choose another --out, or replace it with {hint}."
        )


def clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        for path in (folder / name for name in _OWN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot clear {folder}: {error}") from error


def editor_folder(path: Path) -> Path:
    """The folder of the editor itself, for it or for its run's folder.

    Raises:
        StorageError: there is no editor.
    """
    for folder in (path, path / EDITOR):
        if (folder / "editor.json").exists():
            return folder
    if (path / "run.json").exists():
        raise StorageError(
            f"The run in {path} has not finished, so it has no editor yet. Finish it with: "
            f"emendo train --resume --out {path}"
        )
    raise StorageError(f"{path} holds no editor. Train one with: emendo train --out {path}")


def digest(records: Iterable[Record]) -> str:
    """16 hex digits that stand for records."""
    return hashlib.blake2b(
        "\n".join(map(repr, records)).encode("utf-8", "replace"), digest_size=8
    ).hexdigest()
