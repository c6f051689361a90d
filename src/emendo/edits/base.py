"""What an edit of any kind offers, and how it is kept.

A kind says how it is applied and what is to be kept. Kept as a folder (``edit.safetensors``, ``edit.json`` and a card
for people) or as bytes, an edit carries the checksum of all that it is: damage is named when it is read.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from emendo._storage import folder_of, new_folder, read_json, read_tensors, upload, write_json, write_tensors
from emendo.edits._card import card_of
from emendo.edits.provenance import Origin
from emendo.errors import MismatchError, StorageError
from emendo.models._fingerprint import fingerprint
from emendo.models.lm import LM

FORMAT = 2  # 1 had no checksum
WEIGHTS = "weights"
"""The kind of edits that change weights; files of the first format do not name it."""


class BaseEdit(ABC):
    """What an edit of any kind offers. Immutable; the model is never changed by it.

    A kind says how it is :meth:`applied` and what is to be kept (:meth:`_content`, :meth:`_restored`); saving and
    reading come with it.

    Attributes:
        kind: what ``edit.json`` calls edits of this kind.
        origin: what made it, for which model, from which request.
        card: figures about the edit that whoever made it wants to keep, as JSON values.
    """

    kind: ClassVar[str]
    origin: Origin
    card: Mapping[str, Any]

    @abstractmethod
    def applied(self, model: LM) -> AbstractContextManager[LM]:
        """The edited model for the length of a ``with`` block; the model itself is afterwards as it was.

        Raises:
            MismatchError: the model is not the one that the edit was made for.
        """

    @abstractmethod
    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which :meth:`_restored` makes the edit again."""

    @classmethod
    @abstractmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        """The edit of what :meth:`_content` gave."""

    def with_card(self, card: Mapping[str, Any]) -> Self:
        """The same edit with other figures."""
        return replace(self, card=card)  # type: ignore[type-var]  # every kind is a dataclass

    def check(self, model: nn.Module | LM) -> None:
        """Make sure that the edit was made for this model.

        Raises:
            MismatchError: it was made for another one.
        """
        found = model.fingerprint if isinstance(model, LM) else fingerprint(model)
        if found != self.origin.fingerprint:
            raise MismatchError(
                f"This edit was made for {self.origin.model!r} with fingerprint {self.origin.fingerprint}, but "
                f"the model at hand has fingerprint {found}. Load the model that the edit was made for."
            )

    def _parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The head and the tensors, as they are kept."""
        tensors, values = self._content()
        head = {
            "format": FORMAT,
            "kind": self.kind,
            "origin": self.origin.as_dict(),
            "card": dict(self.card),
            **({"content": values} if values else {}),
        }
        return head, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    @property
    def digest(self) -> str:
        """The SHA-256 of :meth:`to_bytes`: two edits with the same digest are the same in every bit."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The whole edit as a safetensors file, its head in the file's metadata."""
        return _packed(*self._parts())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The edit that :meth:`to_bytes` gave.

        Raises:
            StorageError: the bytes are damaged, from a newer emendo, or of another kind.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["emendo"])
            tensors = safetensors.torch.load(data)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"These bytes are no edit, or they are damaged: {error!r}.") from error
        return cls._of_parts(_readable(head, "This edit"), tensors, "This edit")

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``edit.safetensors``, ``edit.json`` and a card (``README.md``) into a folder, all or nothing.

        Raises:
            StorageError: the folder already holds something, or cannot be written.
        """
        with new_folder(folder, overwrite=overwrite) as new:
            self._write(new)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Put the edit's folder on the Hugging Face hub, card and all.

        Args:
            repo_id: such as ``"user/name"``; made if need be.
            private: make the repository private, if it is made now.
            token: to write with; by default the one of ``hf auth login``.

        Returns:
            The address of the commit.

        Raises:
            StorageError: the hub cannot be reached, or does not let us.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as temporary:
            self._write(Path(temporary))
            return upload(Path(temporary), repo_id, private=private, token=token)

    def _write(self, folder: Path) -> None:
        head, tensors = self._parts()
        checksum = hashlib.sha256(_packed(head, tensors)).hexdigest()
        write_tensors(folder / "edit.safetensors", tensors)
        write_json(folder / "edit.json", {**head, "checksum": checksum})
        (folder / "README.md").write_text(card_of(self.origin, self.card), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read an edit of this kind from its folder, or from the hub (``"user/name"``).

        :func:`emendo.editors.read_edit` reads any kind.

        Raises:
            StorageError: a file is missing, damaged, from a newer emendo, or of another kind.
        """
        where = folder_of(folder)
        head = edit_head(where)
        tensors = read_tensors(where / "edit.safetensors")
        checksum = head.pop("checksum", None)
        if head["format"] > 1 and hashlib.sha256(_packed(head, tensors)).hexdigest() != checksum:
            raise StorageError(
                f"{where} is damaged: its content does not have the checksum that it was saved with."
            )
        return cls._of_parts(head, tensors, str(where))

    @classmethod
    def _of_parts(cls, head: dict[str, Any], tensors: dict[str, Tensor], where: str) -> Self:
        if (kind := head.get("kind", WEIGHTS)) != cls.kind:
            raise StorageError(
                f"{where} is an edit of the kind {kind!r}, not {cls.kind!r}; emendo.editors.read_edit reads any."
            )
        try:
            origin = Origin.of(head["origin"])
            return cls._restored(tensors, head.get("content", {}), origin, head.get("card", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{where} is damaged: {error!r} is missing or not as expected.") from error


def edit_head(folder: Path) -> dict[str, Any]:
    """What ``edit.json`` says.

    Raises:
        StorageError: it is missing, damaged, or from a newer emendo.
    """
    return _readable(read_json(folder / "edit.json"), str(folder / "edit.json"))


def _readable(head: Any, where: str) -> dict[str, Any]:
    if not isinstance(head, dict) or head.get("format") not in range(1, FORMAT + 1):
        raise StorageError(f"{where} is not an edit that this version of emendo can read.")
    return head


def _packed(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A head and tensors as one safetensors file; the same ones give the same bytes."""
    return safetensors.torch.save(dict(tensors), {"emendo": json.dumps(head, ensure_ascii=False)})
