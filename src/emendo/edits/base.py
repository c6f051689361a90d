"""The interface of an edit of any kind, and its storage.

An edit is stored as a folder (``edit.safetensors``, ``edit.json`` and a card, ``README.md``) or as bytes. Both carry a
checksum over the whole content, so that damage is detected when the edit is read.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from emendo._outputs import EDIT
from emendo._storage import folder_of, new_folder, read_json, read_tensors, upload, write_json, write_tensors
from emendo.edits._card import card_of
from emendo.edits._provenance import Origin
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.models._fingerprint import difference, fingerprint, same_model
from emendo.models.lm import LM

FORMAT = 2
WEIGHTS = "weights"
"""The kind of edits that change weights."""
_FIRST_FORMAT = {"format", "origin", "card"}
"""The fields of format 1, which had neither kinds nor a checksum."""


class BaseEdit(ABC):
    """An edit of any kind. It is immutable and never changes the model.

    A kind implements :meth:`applied`, and :meth:`_content` with :meth:`_restored` for storage.

    Attributes:
        kind: the name of this kind in ``edit.json``.
        origin: the method, the model and the requests.
        card: figures about the edit, as JSON values.
    """

    kind: ClassVar[str]
    origin: Origin
    card: Mapping[str, Any]

    @abstractmethod
    def applied(self, model: LM) -> AbstractContextManager[LM]:
        """The edited model for the length of a ``with`` block. The model itself stays as it is.

        Raises:
            MismatchError: the edit belongs to another model.
        """

    @abstractmethod
    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and JSON values from which :meth:`_restored` makes the edit again."""

    @classmethod
    @abstractmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        """The inverse of :meth:`_content`.

        Raises:
            KeyError, TypeError, ValueError: the content is not that of an edit.
        """

    @property
    def rank(self) -> int:
        """The highest rank among the changed matrices; 0 where no weights change."""
        return 0

    def relative_norms(self, model: nn.Module | LM) -> dict[str, float]:
        """``||dW|| / ||W||`` (Frobenius) of each changed matrix; empty where no weights change."""
        return {}

    def with_card(self, card: Mapping[str, Any]) -> Self:
        """The same edit with another card."""
        return replace(self, card=card)  # type: ignore[type-var]  # every kind is a dataclass

    def fits(self, model: nn.Module | LM) -> bool:
        """Whether the edit belongs to this model."""
        return same_model(_fingerprint(model), self.origin.fingerprint)

    def check(self, model: nn.Module | LM) -> None:
        """Make sure that the edit belongs to this model.

        Raises:
            MismatchError: it belongs to another one.
        """
        if not self.fits(model):
            found = _fingerprint(model)
            raise MismatchError(
                f"This edit was made for {self.origin.model!r} with fingerprint {self.origin.fingerprint}, but this "
                f"model has fingerprint {found}. {difference(found, self.origin.fingerprint)}. Load the model that the "
                "edit was made for."
            )

    def check_numbers(self) -> None:
        """Make sure that every number of the edit is finite.

        Raises:
            RequestError: a tensor holds NaN or infinity.
        """
        for name, tensor in self._content()[0].items():
            if not bool(tensor.isfinite().all()):
                raise RequestError(
                    f"The edit holds NaN or infinite numbers at {name}, so it would destroy every answer. Make it "
                    "again with another editor or other settings."
                )

    def _parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The head and the tensors, as they are stored."""
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
        """The SHA-256 of :meth:`to_bytes`: edits with the same digest are equal in every bit."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The whole edit as a safetensors file, with its head in the metadata."""
        return _packed(*self._parts())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of :meth:`to_bytes`.

        Raises:
            StorageError: the bytes are damaged, from a newer emendo, or an edit of another kind.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["emendo"])
            tensors = safetensors.torch.load(data)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise StorageError(f"These bytes are not an edit, or are damaged: {error!r}.") from error
        return cls._of_parts(_readable(head, "This edit"), tensors, "This edit")

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``edit.safetensors``, ``edit.json`` and a card (``README.md``) into a folder, all or nothing.

        Raises:
            StorageError: the folder is not empty, or cannot be written.
            RequestError: the edit holds NaN or infinite numbers.
        """
        self.check_numbers()
        with new_folder(folder, EDIT, overwrite=overwrite) as new:
            self._write(new)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the edit's folder with its card to the Hugging Face hub.

        Args:
            repo_id: such as ``"user/name"``; created where it does not exist.
            private: whether a new repository is private.
            token: a token that may write; by default that of ``hf auth login``.

        Returns:
            The address of the commit.

        Raises:
            StorageError: the hub cannot be reached, or refuses the upload.
        """
        self.check_numbers()
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

        :func:`emendo.editors.read_edit` reads an edit of any kind.

        Raises:
            StorageError: a file is missing, damaged, from a newer emendo, or an edit of another kind.
        """
        where = folder_of(folder)
        head = edit_head(where)
        tensors = read_tensors(where / "edit.safetensors")
        checksum = head.pop("checksum", None)
        if head["format"] > 1 and not _intact(head, tensors, checksum):
            raise StorageError(
                f"{where} is damaged: its content does not match the checksum that was saved with it."
            )
        edit = cls._of_parts(head, tensors, str(where))
        try:
            edit.check_numbers()
        except RequestError as error:
            raise StorageError(f"{where} cannot be used. {error}") from error
        return edit

    @classmethod
    def _of_parts(cls, head: dict[str, Any], tensors: dict[str, Tensor], where: str) -> Self:
        if (kind := head.get("kind", WEIGHTS)) != cls.kind:
            raise StorageError(
                f"{where} is an edit of the kind {kind!r}, not {cls.kind!r}; emendo.editors.read_edit reads any kind."
            )
        try:
            card = head.get("card", {})
            if not isinstance(card, dict):
                raise TypeError("card")
            return cls._restored(tensors, head.get("content", {}), Origin.of(head["origin"]), card)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            wrong = f"it has no {error}" if isinstance(error, KeyError) else f"{error} is wrong"
            raise StorageError(f"{where} is damaged: {wrong}.") from error


def edit_head(folder: Path) -> dict[str, Any]:
    """The content of ``edit.json``.

    Raises:
        StorageError: it is missing, damaged, or from a newer emendo.
    """
    return _readable(read_json(folder / "edit.json"), str(folder / "edit.json"))


def _readable(head: Any, where: str) -> dict[str, Any]:
    version = head.get("format") if isinstance(head, dict) else None
    if isinstance(version, bool) or version not in range(1, FORMAT + 1):
        raise StorageError(f"{where} is not an edit that this version of emendo can read.")
    if version == 1 and not head.keys() <= _FIRST_FORMAT:
        raise StorageError(
            f"{where} is damaged: it claims format 1, which had no field {min(head.keys() - _FIRST_FORMAT)!r}."
        )
    return head  # type: ignore[no-any-return]


def _packed(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A head and tensors as one safetensors file; equal input gives equal bytes."""
    return safetensors.torch.save(dict(tensors), {"emendo": json.dumps(head, ensure_ascii=False)})


def _intact(head: Mapping[str, Any], tensors: Mapping[str, Tensor], checksum: Any) -> bool:
    """Whether the parts of an edit have the checksum that was saved with them."""
    try:
        return bool(hashlib.sha256(_packed(head, tensors)).hexdigest() == checksum)
    except (SafetensorError, TypeError, ValueError, RecursionError):  # such as text that is not valid Unicode
        return False


def _fingerprint(model: nn.Module | LM) -> str:
    return model.fingerprint if isinstance(model, LM) else fingerprint(model)
