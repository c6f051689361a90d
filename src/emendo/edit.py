"""An edit: low-rank changes of a few matrices, and where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

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


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a model: ``dW = left @ right`` at each site. Immutable; the model is never changed by it.

    Attributes:
        deltas: module name -> its change.
        origin: what made it, for which model, from which request.
        card: figures about the edit that whoever made it wants to keep, as JSON values.
    """

    deltas: Mapping[str, LowRank]
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, model: nn.Module | LM) -> Attachment:
        """Add the edit beside the model's matrices until the returned attachment is detached.

        Raises:
            MismatchError: the model is not the one that the edit was made for.
        """
        module = model.model if isinstance(model, LM) else model
        found = model.fingerprint if isinstance(model, LM) else fingerprint(model)
        if found != self.origin.fingerprint:
            raise MismatchError(
                f"This edit was made for {self.origin.model!r} with fingerprint {self.origin.fingerprint}, but "
                f"the model at hand has fingerprint {found}. Load the model that the edit was made for."
            )
        stack = ExitStack()
        stack.enter_context(applied(module, self.deltas))
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

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``edit.safetensors`` and ``edit.json`` into a folder, all or nothing.

        Raises:
            StorageError: the folder already holds something, or cannot be written.
        """
        with new_folder(folder, overwrite=overwrite) as new:
            tensors = {}
            for name, delta in self.deltas.items():
                tensors[f"{name}.left"] = delta.left
                tensors[f"{name}.right"] = delta.right
            write_tensors(new / "edit.safetensors", tensors)
            write_json(
                new / "edit.json", {"format": FORMAT, "origin": asdict(self.origin), "card": dict(self.card)}
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Edit:
        """Read an edit from its folder.

        Raises:
            StorageError: a file is missing, damaged, or from a newer emendo.
        """
        where = Path(folder).expanduser()
        head = read_json(where / "edit.json")
        if not isinstance(head, dict) or head.get("format") not in range(1, FORMAT + 1):
            raise StorageError(f"{where / 'edit.json'} is not an edit that this version of emendo can read.")
        tensors = read_tensors(where / "edit.safetensors")
        try:
            origin = dict(head["origin"])
            origin["requests"] = tuple(Request(**request) for request in origin["requests"])
            names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
            deltas = {name: LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}
            return cls(deltas, Origin(**origin), head.get("card", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{where} is damaged: {error!r} is missing or not as expected.") from error


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
