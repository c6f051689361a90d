"""The folder of a training run.

::

    DIR/run.json                 the request and, once the run has finished, the result
        checkpoint.safetensors   the whole state, renewed every minute (see emendo.train.checkpoint)
        history.json             figures of the steps and validations
        editor/                  the trained editor
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from emendo._outputs import DEMO, TRAINING, Kind, clear
from emendo._runs import has_run, read_run, write_run
from emendo._storage import new_file, write_json
from emendo.cli._paths import EDITOR, claim
from emendo.cli._settings import RunSettings
from emendo.data import Record
from emendo.editors import Editor
from emendo.errors import RequestError, StorageError
from emendo.train.checkpoint import FILE as CHECKPOINT

_PATHS = ("model", "data", "validation", "text")
_KINDS: Mapping[str, Kind] = {"train": TRAINING, "demo": DEMO}
"""The kind of folder of each command that trains."""


@dataclass(frozen=True)
class Run:
    """A training run and its folder.

    Attributes:
        folder: the folder.
        settings: everything that determines the run.
        options: the same as options of the command: those that were given, and the defaults.
        command: the command that started the run, ``train`` or ``demo``.
        data: digest of the records, once they have been read.
        result: the command's output about the run, once it has finished.
        resuming: whether the run continues an earlier session.
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
        """The folder of the trained editor, which exists once the run has finished."""
        return self.folder / EDITOR

    @property
    def finished(self) -> bool:
        """Whether the run has finished and its editor is there."""
        return bool(self.result) and (self.editor / "editor.json").exists()

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to resume from."""
        return (self.folder / CHECKPOINT).exists()

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read the run in a folder.

        Raises:
            StorageError: the folder holds no training run, or one that this version cannot read.
        """
        head = read_run(folder, tuple(_KINDS.values()), "to resume; start one without --resume.")
        try:
            settings = RunSettings(**head["settings"])
            return cls(folder, settings, head["options"], head["command"], head["data"], head["result"], True)
        except (KeyError, TypeError) as error:
            raise StorageError(f"{folder / 'run.json'} is damaged: {error}") from error

    def write(self) -> None:
        """Write ``run.json``.

        Raises:
            StorageError: it cannot be written.
        """
        head = {"command": self.command, "data": self.data, "options": dict(self.options)}
        write_run(self.folder, {**head, "settings": asdict(self.settings), "result": dict(self.result)})

    def clear(self) -> None:
        """Remove what the run wrote, and nothing else.

        Raises:
            StorageError: it cannot be removed.
        """
        clear(self.folder, _KINDS[self.command])

    def begin(self, records: Iterable[Record], *, writes: bool = True) -> Run:
        """Start in an empty folder, or make sure that a resumed run has the same records.

        Args:
            records: all of them.
            writes: whether this process writes the folder; one of several does.

        Raises:
            StorageError: the records of a resumed run have changed, or the folder cannot be written.
        """
        data = digest(records)
        if self.resuming:
            if data != self.data:
                raise StorageError(
                    f"The records of {self.settings.data} are not those that {self.folder} was started with, so the "
                    "run cannot be resumed. Start again with --overwrite."
                )
            return self
        run = replace(self, data=data)
        if writes:
            self.clear()
            run.write()
        return run

    def finish(self, editor: Editor, history: list[dict[str, float]], result: Mapping[str, Any]) -> Run:
        """Save the editor and the result.

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
    """Prepare a new run; nothing is written yet.

    Raises:
        StorageError: the folder holds something that may not be replaced.
        RequestError: an option is not valid.
    """
    read = [options.get(name) for name in _PATHS]
    claim(folder, _KINDS[command], model=options.get("model"), inputs=read, overwrite=overwrite)
    settings = RunSettings.from_options(options)
    places = {name: getattr(settings, name) for name in _PATHS if options.get(name) is not None}
    plain = {name: value for name, value in options.items() if value is not None}
    return Run(folder, settings, {**plain, **places}, command)


def resumed_run(folder: Path, given: Mapping[str, Any]) -> Run:
    """Open a run to resume it.

    Args:
        folder: its folder.
        given: options on the command line; they must be the same as when the run was started.

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
                f"then, {value} now). Leave the option out to resume, or start again with --overwrite."
            )
    return run


def editor_folder(path: Path) -> Path:
    """Find the folder of an editor, given that folder or the folder of its training run.

    Raises:
        StorageError: there is no editor.
    """
    for folder in (path, path / EDITOR):
        if (folder / "editor.json").exists():
            return folder
    if has_run(path):
        raise StorageError(
            f"The run in {path} has not finished, so it has no editor yet. Finish it with: "
            f"emendo train --resume --out {path}"
        )
    raise StorageError(f"{path} holds no editor. Train one with: emendo train --out {path}")


def digest(records: Iterable[Record]) -> str:
    """16 hex digits that identify records."""
    lines = (f"{r!r}{'' if r.separator is None else repr(r.separator)}" for r in records)
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "replace"), digest_size=8).hexdigest()
