"""An edit, and where it came from: low-rank changes of a few matrices, or what else answers in a model's place.

Every kind of edit is an :class:`AnyEdit`, used and saved in one way::

    with edit.applied(lm) as edited:
        edited.generate("The capital of Australia is")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from emendo._version import __version__
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.files import new_folder, read_json, read_tensors, write_json, write_tensors
from emendo.fingerprint import fingerprint
from emendo.lowrank import LowRank, applied
from emendo.models import LM

FORMAT = 1
M = TypeVar("M", nn.Module, LM)


@dataclass(frozen=True, slots=True)
class Request:
    """One wish: after ``prompt`` the model shall say ``target``."""

    prompt: str
    target: str

    def __post_init__(self) -> None:
        for what, text in (("prompt", self.prompt), ("target", self.target)):
            if not isinstance(text, str) or not text.strip():
                raise RequestError(f"The {what} is empty: {text!r}. An edit needs a prompt and a target.")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an edit came from.

    Attributes:
        fingerprint: of the model it was made for.
        model: the name that model was loaded by.
        editor: the method's name.
        settings: the method's settings.
        requests: what was asked.
        date: when, ISO 8601 in UTC.
        version: of emendo.
    """

    fingerprint: str
    model: str
    editor: str
    settings: Mapping[str, Any]
    requests: tuple[Request, ...]
    date: str
    version: str = __version__


class Attachment:
    """An edit attached to a model; :meth:`detach` takes it off, once and for all."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def detach(self) -> None:
        """Take the edit off. The model is bit for bit what it was; calling it again does nothing."""
        self._stack.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class AnyEdit(ABC):
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

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``edit.safetensors`` and ``edit.json`` into a folder, all or nothing.

        Raises:
            StorageError: the folder already holds something, or cannot be written.
        """
        tensors, values = self._content()
        head = {"format": FORMAT, "kind": self.kind, "origin": asdict(self.origin), "card": dict(self.card)}
        with new_folder(folder, overwrite=overwrite) as new:
            write_tensors(new / "edit.safetensors", tensors)
            write_json(new / "edit.json", head | ({"content": values} if values else {}))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read an edit of this kind from its folder; :func:`emendo.editors.read_edit` reads any kind.

        Raises:
            StorageError: a file is missing, damaged, from a newer emendo, or of another kind.
        """
        where = Path(folder).expanduser()
        head = edit_head(where)
        if (kind := head.get("kind", Edit.kind)) != cls.kind:
            raise StorageError(
                f"{where} holds an edit of the kind {kind!r}, not {cls.kind!r}; emendo.editors.read_edit reads any."
            )
        tensors = read_tensors(where / "edit.safetensors")
        try:
            origin = dict(head["origin"])
            origin["requests"] = tuple(Request(**request) for request in origin["requests"])
            return cls._restored(tensors, head.get("content", {}), Origin(**origin), head.get("card", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{where} is damaged: {error!r} is missing or not as expected.") from error


def edit_head(folder: Path) -> dict[str, Any]:
    """What ``edit.json`` says.

    Raises:
        StorageError: it is missing, damaged, or from a newer emendo.
    """
    head = read_json(folder / "edit.json")
    if not isinstance(head, dict) or head.get("format") not in range(1, FORMAT + 1):
        raise StorageError(f"{folder / 'edit.json'} is not an edit that this version of emendo can read.")
    return head


@dataclass(frozen=True, eq=False)
class Edit(AnyEdit):
    """A change of a model's weights: ``dW = left @ right`` at each site.

    Attributes:
        deltas: module name -> its change.
    """

    kind: ClassVar[str] = "weights"
    deltas: Mapping[str, LowRank]
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, model: nn.Module | LM) -> Attachment:
        """Add the edit beside the model's matrices until the returned attachment is detached.

        Raises:
            MismatchError: the model is not the one that the edit was made for.
        """
        self.check(model)
        stack = ExitStack()
        stack.enter_context(applied(model.model if isinstance(model, LM) else model, self.deltas))
        return Attachment(stack)

    @contextmanager
    def applied(self, model: M) -> Iterator[M]:
        """The edit attached for the length of a ``with`` block, which is given the model; see :meth:`attach`."""
        with self.attach(model):
            yield model

    @property
    def rank(self) -> int:
        """The highest rank among the sites."""
        return max(delta.rank for delta in self.deltas.values())

    @torch.no_grad()
    def relative_norms(self, model: nn.Module | LM) -> dict[str, float]:
        """``||dW|| / ||W||`` (Frobenius) for each site."""
        module = model.model if isinstance(model, LM) else model
        return {
            name: float(delta.norm()) / float(_weight(module, name).double().norm())
            for name, delta in self.deltas.items()
        }

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        factors = {}
        for name, delta in self.deltas.items():
            factors[f"{name}.left"] = delta.left
            factors[f"{name}.right"] = delta.right
        return factors, {}

    @classmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
        deltas = {name: LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}
        return cls(deltas, origin, card)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
