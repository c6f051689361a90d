"""Ways to damage a folder that was saved, and a disk that is full."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emendo import _storage as files

Damage = Callable[[Path], None]


def cut(name: str) -> Damage:
    """Keep only the first half of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def remove(name: str) -> Damage:
    """Take a file away."""
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, change: Callable[[Any], Any]) -> Damage:
    """Change a JSON file, leaving it JSON."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return damage


def drop_tensor(name: str, ending: str) -> Damage:
    """Leave out the first tensor whose name ends so; the file stays whole."""

    def damage(folder: Path) -> None:
        tensors = files.read_tensors(folder / name)
        del tensors[next(key for key in sorted(tensors) if key.endswith(ending))]
        files.write_tensors(folder / name, tensors)

    return damage


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    """The same object without one key."""
    return {name: content for name, content in value.items() if name != key}


def full_disk(*_: Any, **__: Any) -> None:
    """Stands for any function that writes."""
    raise OSError(errno.ENOSPC, "No space left on device")
