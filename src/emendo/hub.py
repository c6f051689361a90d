"""The Hugging Face hub: folders up and folders down."""

from __future__ import annotations

from pathlib import Path

from emendo.errors import StorageError


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
