"""The one rule for every path that a command writes to.

An output replaces only what emendo itself wrote there as the same kind of output: a folder only with --overwrite, a
single file (a report, a plot) at once. Anything else is never replaced, with --overwrite or without. An output is never
an input of the command, the model or its ledger, a folder that contains one of them, or a place inside one. The user's
own files beside those of emendo are never touched. Symbolic links are followed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from emendo.errors import StorageError


@dataclass(frozen=True)
class Kind:
    """A kind of output.

    Attributes:
        name: as messages call it.
        is_own: whether an existing path carries the marker of this kind; may raise OSError or ValueError.
        files: patterns of the names that emendo writes into a folder of this kind; empty for a single file.
        or_else: what a user can do with an existing output instead of replacing it.
    """

    name: str
    is_own: Callable[[Path], bool]
    files: tuple[str, ...] = ()
    or_else: str = ""

    def owns(self, name: str) -> bool:
        """Whether an entry of the folder is emendo's."""
        return any(fnmatchcase(name, pattern) for pattern in self.files)


def claim(
    path: str | Path, kind: Kind, inputs: Iterable[str | Path | None] = (), *, overwrite: bool = False
) -> Path:
    """Make sure that an output may be written to a path.

    Args:
        path: the output.
        kind: its kind.
        inputs: what the command reads: the model, its ledger, edits, editors, files. Names that are no path, and None,
            are passed over.
        overwrite: replace an older folder of the same kind. A single file, such as a report, needs no permission.

    Returns:
        The path, with links followed.

    Raises:
        StorageError: the path may not be written to.
    """
    try:
        real = Path(os.path.realpath(Path(path).expanduser()))
        for other in inputs:
            _keep_apart(path, real, other)
        if not real.exists():
            if real.is_symlink():
                raise StorageError(f"{path} is a symbolic link that leads in a circle.")
            return real
        if bool(kind.files) != real.is_dir() or not (real.is_dir() or real.is_file()):
            form = "a folder" if kind.files else "a regular file"
            raise StorageError(f"{path} exists and is not {form}; choose another path for {kind.name}.")
        if kind.files and not any(real.iterdir()):
            return real
        if not _is_own(kind, real):
            raise StorageError(
                f"{path} already holds something that is not emendo's, or not {kind.name}, and is never replaced: "
                "choose another path, or move it away first."
            )
        if kind.files and not overwrite:
            raise StorageError(
                f"{path} already holds something ({kind.name}); choose another path, or replace it with --overwrite"
                f"{kind.or_else}."
            )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error
    return real


def clear(folder: Path, kind: Kind) -> None:
    """Remove what emendo wrote into a folder of a kind, and nothing else.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if kind.owns(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise StorageError(f"{folder} cannot be cleared: {error.strerror or error}.") from error


def _is_own(kind: Kind, path: Path) -> bool:
    try:
        return kind.is_own(path)
    except (OSError, ValueError, RecursionError):
        return False


def _keep_apart(path: str | Path, real: Path, other: str | Path | None) -> None:
    """Refuse an output that is an input, contains one, or lies inside one."""
    if other is None or not (given := Path(other).expanduser()).exists():
        return
    read = Path(os.path.realpath(given))
    if real == read or (real.exists() and real.samefile(read)):
        relation = "is"
    elif read.is_relative_to(real):
        relation = "contains"
    elif real.is_relative_to(read):
        relation = "lies inside"
    else:
        return
    raise StorageError(
        f"The output {path} {relation} {other}, which this command reads. Choose another path."
    )


# ------------------------------------------------------------------------------------------------ kinds


def _head(folder: Path, name: str) -> Mapping[str, Any]:
    """The JSON object in a marker file."""
    file = folder / name
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return value if isinstance(value, dict) else {}


def _is_run(folder: Path, command: str) -> bool:
    head = _head(folder, "run.json")
    return "settings" in head and head.get("command") == command


def _is_adapter(folder: Path) -> bool:
    if _head(folder, "emendo.json").get("form") == "peft":
        return True
    card = folder / "README.md"  # the adapters of emendo 0.1.0 have no emendo.json
    made = card.is_file() and "emendo" in card.read_text(encoding="utf-8").partition("\n---")[0]
    return made and _head(folder, "adapter_config.json").get("peft_type") == "LORA"


def _is_report(file: Path) -> bool:
    page = file.read_bytes()
    return page.startswith(b"<!doctype html>") and b"<footer>Written by emendo." in page[-4096:]


def _is_plot(file: Path) -> bool:
    start = file.read_bytes()[:4096]
    return b"Software\0emendo" in start or b"<dc:title>emendo</dc:title>" in start


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as handle:
        start = handle.read(4096)
    return start.startswith(b"GGUF") and b"emendo.version" in start


EDIT = Kind(
    "an edit",
    lambda folder: {"format", "origin"} <= _head(folder, "edit.json").keys(),
    ("edit.json", "edit.safetensors", "README.md"),
)
EDITOR = Kind(
    "an editor",
    lambda folder: {"format", "editor"} <= _head(folder, "editor.json").keys(),
    ("editor.json", "editor.safetensors", "README.md"),
)
ADAPTER = Kind(
    "an adapter that emendo exported",
    _is_adapter,
    ("adapter_config.json", "adapter_model.safetensors", "README.md", "emendo.json"),
)
ADAPTERS = Kind(
    "adapters of a memory",
    lambda folder: {"format", "adapters"} <= _head(folder, "index.json").keys(),
    ("index.json", "edit-*", "emendo-*.gguf"),
)
CHECKPOINT = Kind(
    "a merged checkpoint",
    lambda folder: "merge_loss" in _head(folder, "emendo.json"),
    (
        *("emendo.json", "README.md", "config.json", "generation_config.json", "model*.safetensors*"),
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
        *("chat_template*", "additional_chat_templates", "*processor_config.json"),
    ),
)
_RUN = ("run.json", "checkpoint.safetensors", "history.json", "editor")
TRAINING = Kind(
    "a training run", lambda folder: _is_run(folder, "train"), _RUN, ", or resume it with --resume"
)
DEMO = Kind(
    "a run of the demo",
    lambda folder: _is_run(folder, "demo"),
    (*_RUN, "edit", "evaluation.json", "report.html"),
)
EVALUATION = Kind(
    "an evaluation",
    lambda folder: {"format", "key", "asked"} <= _head(folder, "run.json").keys(),
    (
        *("run.json", "records.jsonl", "parts", "answers.parquet", "edits.parquet", "lm-eval.jsonl"),
        *("right-after.*.parquet", "after-*.parquet", "report.html", "summary.md"),
    ),
)
GGUF = Kind("a GGUF adapter that emendo exported", _is_gguf)
REPORT = Kind("a report of emendo", _is_report)
PLOT = Kind("a plot of emendo", _is_plot)
