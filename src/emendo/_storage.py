"""Writing so that nothing is lost, and reading so that damage is named."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from emendo.errors import StorageError


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder all at once: a temporary sibling is filled, then renamed into place.

    A failure on the way (a full disk, an exception) removes the temporary and leaves what was there before.

    Args:
        folder: where the files shall be.
        overwrite: replace a folder that already holds something.

    Raises:
        StorageError: the folder already holds something, or cannot be written.
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise StorageError(f"{target} already exists; choose another place, or ask to overwrite it.")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"Cannot write {target}: {error}. What was there before is unchanged.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write one file all at once: yields a temporary path that is renamed into place on success.

    Raises:
        StorageError: it cannot be written; the previous file, if any, survives.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"Cannot write {target}: {error}. The previous file survives.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors as safetensors; views are made contiguous."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Load a safetensors file.

    Raises:
        StorageError: it is missing or damaged.
    """
    if not Path(path).exists():
        raise StorageError(f"{path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged and cannot be read: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Save a JSON file that reads well."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Load a JSON file.

    Raises:
        StorageError: it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise StorageError(f"{path} is damaged and cannot be read: {error}") from error


# --------------------
# The Hugging Face hub: folders up and folders down.


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Put a folder's files into a repository, which is made if need be.

    Returns:
        The address of the commit.

    Raises:
        StorageError: the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Made with emendo"))
    except _failures() as error:
        raise StorageError(f"Cannot write to {repo_id} on the hub: {error}") from error


def folder_of(name: str | Path) -> Path:
    """A local folder as it is, or the files of a repository on the hub, downloaded once.

    Args:
        name: a folder, or a repository's id such as ``"user/name"``.

    Raises:
        StorageError: it is no folder, and the hub has no such repository or cannot be reached.
    """
    local = Path(name).expanduser()
    if isinstance(name, Path) or local.exists() or local.is_absolute() or name.count("/") != 1:
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except _failures() as error:
        raise StorageError(
            f"{name} does not exist as a folder here, nor as a repository on the hub: {error}"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors are of the first two kinds, the network's may not be."""
    from huggingface_hub import errors

    return OSError, ValueError, getattr(errors, "HTTPError", OSError)
