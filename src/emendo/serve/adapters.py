"""Edits as adapter files for another engine, named by their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emendo._adapter_names import adapter_name
from emendo.edits import compose, to_gguf, to_peft
from emendo.models.lm import LM
from emendo.serve.backend import Part

Form = Literal["peft", "gguf"]


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder with an adapter for each change that was asked for.

    Attributes:
        folder: the folder, which the engine reads too.
        form: ``"peft"`` for a folder of its own with safetensors, ``"gguf"`` for a file.
        max_rank: cuts every adapter to this rank, since engines limit it; None cuts none.
        seen_as: the same folder as the engine sees it, such as in a container.
    """

    folder: Path
    form: Form = "peft"
    max_rank: int | None = None
    seen_as: Path | None = None

    def name(self, parts: Sequence[Part]) -> str:
        """The name of the adapter of some changes."""
        return adapter_name([part.digest for part in parts], self.max_rank)

    def path(self, name: str) -> str:
        """The path of an adapter, as the engine sees it."""
        return str((self.seen_as or self.folder) / self._file(name))

    def write(self, lm: LM, parts: Sequence[Part]) -> str:
        """Write the adapter of some changes unless it is there; returns its name.

        Args:
            lm: the model, which nothing else runs at the same time.
            parts: the changes, which add up.

        Raises:
            ModelError: the changes cannot be such an adapter.
            StorageError: it cannot be written.
        """
        name = self.name(parts)
        target = self.folder / self._file(name)
        if not target.exists():
            edit = parts[0].edit if len(parts) == 1 else compose([part.edit for part in parts])
            write = to_gguf if self.form == "gguf" else to_peft
            write(edit, lm, target, max_rank=self.max_rank)
        return name

    def _file(self, name: str) -> str:
        return f"{name}.gguf" if self.form == "gguf" else name
