"""Trained editors by name: those that ship with emendo, and those of the hub that are in its cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emendo._storage import folder_of
from emendo.models._fingerprint import same_model

HEAD, WEIGHTS = "editor.json", "editor.safetensors"
SHIPPED = Path(__file__).with_name("shipped")
"""One folder for each editor that ships with emendo."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A trained editor that can be had by its name.

    Attributes:
        name: for ``Editor.from_pretrained`` and ``--editor``.
        folder: its files.
        ships: whether it comes with emendo; otherwise it is in the hub's cache.
        head: the content of ``editor.json``.
    """

    name: str
    folder: Path
    ships: bool
    head: Mapping[str, Any]

    @property
    def info(self) -> Mapping[str, Any]:
        """How it was trained, and ``figures``: what it was measured to do."""
        found = self.head.get("info")
        return found if isinstance(found, dict) else {}

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return (self.folder / WEIGHTS).stat().st_size


def shipped() -> tuple[Entry, ...]:
    """The editors that ship with emendo."""
    folders = sorted(SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    return tuple(entry for folder in folders if (entry := _entry(folder.name, folder, True)))


def cached() -> tuple[Entry, ...]:
    """The editors of the hub that have been fetched, the latest revision of each."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return ()
    found = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        latest = max(repo.revisions, key=lambda revision: revision.last_modified, default=None)
        if latest is not None and (entry := _entry(repo.repo_id, latest.snapshot_path, False)):
            found.append(entry)
    return tuple(found)


def shipped_for(fingerprint: str) -> Entry | None:
    """The shipped editor of the model with a fingerprint; None where there is none."""
    for entry in shipped():
        if same_model(str(entry.head.get("fingerprint")), fingerprint):
            return entry
    return None


def find(name: str | Path) -> Path:
    """The folder of an editor.

    Args:
        name: a folder, the name of a shipped editor, or the id of a repository on the hub such as ``"user/name"``; an
            existing folder takes precedence.

    Raises:
        StorageError: the hub has no such repository or cannot be reached.
    """
    for entry in shipped():
        if name == entry.name and not Path(name).exists():
            return entry.folder
    return folder_of(name)


def _entry(name: str, folder: Path, ships: bool) -> Entry | None:
    """The editor in a folder; None where there is none that can be read."""
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Entry(name, folder, ships, head) if isinstance(head, dict) and "editor" in head else None
