"""Files: atomic writes, reads that report damage, digests, and folders on the Hugging Face hub.

Every file that emendo writes is written through this module, so a crash or a full disk never leaves half a file
behind. Importing it does not import torch: the command line starts without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from emendo._outputs import Kind, claim
from emendo.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def digest(value: Any) -> str:
    """16 hex digits that identify a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finite_values(value: Any) -> Any:
    """A JSON value with None instead of the numbers that JSON does not have."""
    if value is None or isinstance(
        value, str | int
    ):  # first, because a ledger's log has hundreds of thousands
        return value
    if isinstance(value, Mapping):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def finite(value: float | None) -> float | None:
    """The value; None, which becomes JSON's null, where it is infinite or NaN."""
    return value if value is not None and math.isfinite(value) else None


def local_path(path: str | Path) -> Path:
    """The path with ``~`` and ``~user`` expanded.

    Raises:
        StorageError: there is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{path} cannot be expanded: {error}") from error


def cache_folder() -> Path:
    """``$EMENDO_CACHE``, else ``$XDG_CACHE_HOME/emendo``, else ``~/.cache/emendo``.

    Raises:
        StorageError: there is no home folder.
    """
    if own := os.environ.get("EMENDO_CACHE"):
        return local_path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return local_path(base) / "emendo"
    try:
        return Path.home() / ".cache" / "emendo"
    except RuntimeError as error:
        raise StorageError(
            "There is no home folder for the cache; set the environment variable EMENDO_CACHE to a folder."
        ) from error


def reason(error: BaseException) -> str:
    """Why an operation on a file failed, in words: the disk is full, permission denied, and so on."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------- writing


@contextmanager
def new_folder(folder: str | Path, kind: Kind, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder atomically: fill a temporary folder, then rename it to its final name.

    If anything fails, the temporary folder is removed and the previous content stays. The current folder and mount
    points cannot be renamed, and a folder that holds files of the user is not; there emendo's files are moved one by
    one.

    Args:
        folder: the folder to write. A symbolic link is followed.
        kind: the kind of folder; what may be replaced follows :func:`emendo._outputs.claim`.
        overwrite: replace an older folder of the same kind.

    Yields:
        The temporary folder to write the files to.

    Raises:
        StorageError: the folder holds something that may not be replaced, or it cannot be written.
    """
    work: Path | None = None
    try:
        target = claim(folder, kind, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        present = list(target.iterdir()) if target.is_dir() else []
        own = [entry for entry in present if kind.owns(entry.name)]
        in_place = target.is_dir() and (
            len(own) < len(present) or target.is_mount() or target.samefile(Path.cwd())
        )
        parent = target if in_place else target.parent
        work = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=parent))
        new, old = work / "new", work / "old"
        new.mkdir()
        old.mkdir()
        yield new
        for file in new.rglob("*"):
            _flush(file)
        if in_place:
            moves = [(entry, old / entry.name) for entry in own]
            moves += [(entry, target / entry.name) for entry in new.iterdir()]
            if taken := {path.name for _, path in moves} & {path.name for path in present if path not in own}:
                raise StorageError(
                    f"{folder} holds {min(taken)}, which is not emendo's; choose another folder."
                )
        else:
            moves = [(target, old / "previous")] if target.exists() else []
            moves += [(new, target)]
        _rename_all(moves)
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"Cannot write {folder}: {reason(error)}. Its previous content is unchanged."
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write one file atomically: yields a temporary path that is renamed to ``path`` on success.

    Raises:
        StorageError: the file cannot be written; the previous one, if any, is unchanged.
    """
    temporary: Path | None = None
    try:
        target = local_path(path).resolve()
        if target.exists() and not target.is_file():
            raise StorageError(f"Cannot write {path}: it exists and is not a regular file.")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"Cannot write {path}: {reason(error)}. The previous file is unchanged."
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _rename_all(moves: Iterable[tuple[Path, Path]]) -> None:
    """Rename every source to its destination; if one fails, undo those before it."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except OSError:
        for source, destination in reversed(done):
            destination.rename(source)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors as safetensors; views are made contiguous."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def write_json(path: Path, value: Any) -> None:
    """Save an indented JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- reading


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Load a safetensors file.

    Raises:
        StorageError: the file is missing, cannot be read, or is damaged.
    """
    from safetensors.torch import load_file

    _check_readable(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged and cannot be read: {reason(error)}") from error


def read_json(path: str | Path) -> Any:
    """Load a JSON file.

    Raises:
        StorageError: the file is missing, cannot be read, or is not JSON.
    """
    _check_readable(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
        if _SURROGATE_ESCAPE.search(text):  # half a surrogate pair cannot be encoded again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, OSError, RecursionError) as error:
        raise StorageError(f"{path} is damaged and cannot be read: {reason(error)}") from error
    return value


def _check_readable(path: str | Path) -> None:
    """Make sure that a path is a regular file that may be read; opening a pipe or a device could wait forever."""
    file = Path(path)
    try:
        if not file.exists():
            raise StorageError(f"{path} does not exist.")
        if not file.is_file():
            raise StorageError(f"{path} is not a regular file, so it cannot be read.")
        with file.open("rb"):
            pass
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error


# ------------------------------------------------------------------------------------- Hugging Face hub


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a folder to a repository on the hub, which is created if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        StorageError: the hub cannot be reached, or it refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Made with emendo"))
    except _hub_errors() as error:
        raise StorageError(f"Cannot write to {repo_id} on the hub: {reason(error)}") from error


def folder_of(name: str | Path) -> Path:
    """A local folder, or the downloaded files of a repository on the hub.

    Args:
        name: a folder, or a repository's id such as ``"user/name"``; an existing folder takes precedence.

    Raises:
        StorageError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    local = local_path(name)
    if isinstance(name, Path) or local.is_absolute() or name.count("/") != 1 or Path(local).exists():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except _hub_errors() as error:
        raise StorageError(
            f"{name} is neither a folder nor a repository on the hub: {reason(error)}"
        ) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """The errors of the hub's client: OSError, ValueError, and that of its HTTP library if there is no network."""
    from huggingface_hub import errors

    return OSError, ValueError, getattr(errors, "HTTPError", OSError)
