"""The base class of all editors.

A method is a subclass in a file of its own, with a frozen dataclass of settings, and one line in
:data:`emendo.editors.EDITORS`:

- :class:`~emendo.editors.gradient.GradientEditor`: its ``forward`` turns :class:`~emendo.models.capture.Factors` into
  :class:`~emendo.low_rank.LowRank`. Capture, batching, application, saving, training and evaluation
  come with it.
- :class:`Editor`: makes one change for each request in any other way (``each``), such as fine-tuning. Application,
  saving and evaluation come with it.
- An :class:`Editor` that changes no weights at all overrides ``edit`` and returns an edit of its own kind.

Settings are a frozen dataclass that derives from :class:`emendo._settings.Settings`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from emendo._outputs import EDITOR
from emendo._settings import completed
from emendo._storage import new_folder, read_json, read_tensors, upload, write_json, write_tensors
from emendo.editors._card import card_of
from emendo.editors.library import HEAD, WEIGHTS, find
from emendo.edits.edit import BaseEdit, Edit, Origin, Request
from emendo.errors import FramingWarning, MismatchError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models._fingerprint import difference, same_model
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text
from emendo.models.tokenization import to_texts
from emendo.models.trunk_cache import TrunkCache

_E = TypeVar("_E", bound="Editor")
FORMAT = 2
"""Of ``editor.json``. From 2 on a checksum is required."""


class Editor(nn.Module):
    """Base of all editors.

    Args:
        sites: the matrices it edits.
        config: the settings of the method.
        fingerprint: of the model it is bound to; empty before there is one.

    Attributes:
        name: the method's name, as on the command line.
        Config: the class of its settings.
        chat: whether it was trained on prompts in the chat template of that model; None if on both forms.
        info: how it was trained, as JSON values; saved with it.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    needs_training: ClassVar[bool] = True
    """Whether it must be trained before it can edit."""
    makes: ClassVar[type[BaseEdit]] = Edit
    """The class of its edits."""
    no_changes: ClassVar[str] = ""
    """Why it gives no changes of weights, as a clause: :meth:`each` and :meth:`together` raise. Empty where it does."""

    def __init__(self, sites: tuple[Site, ...], config: Any = None, fingerprint: str = "") -> None:
        super().__init__()
        self.sites = sites
        self.config = config if config is not None else self.Config()
        self.fingerprint = fingerprint
        self._checked = 0  # id of the model that has all sites; checking them takes 1% of a tiny model's edit
        self.chat: bool | None = False
        self.info: dict[str, Any] = {}

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The matrices that the method edits unless others are chosen: those of the MLPs in the last blocks."""
        return find_sites(model)

    @abstractmethod
    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model.

        Returns:
            By site name, factors ``[requests, d_out, r]`` and ``[requests, r, d_in]``.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request, one that does not fit the model, or a method that changes no weights.
        """
        raise RequestError(f"{self.no_changes}; call its edit method instead.")

    def one_by_one(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, which :meth:`together` computes for it alone: an :meth:`each` by that."""
        found = [self.together(lm, [request]) for request in requests]
        return {site.name: LowRank.stack([changes[site.name] for changes in found]) for site in self.sites}

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests: by default the sum of their separate changes (MEND, section 3.2)."""
        return {name: delta.sum() for name, delta in self.each(lm, requests).items()}

    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        """Take into account, in the following edits, that the model holds an edit of these requests.

        Call it with that edit applied, for each edit in turn; after a restart, with the requests that the edits keep.
        Methods whose edits do not depend on earlier ones do nothing.
        """

    def start_over(self) -> None:
        """Forget the edits of :meth:`continue_from`."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode for the length of a ``with`` block."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def host(self, lm: LM) -> LM:
        """The model whose weights the edits change: ``lm`` itself, or a copy of it that the method has trained."""
        return lm

    def no_changes_of(self, lm: LM) -> str:
        """Why it gives no changes of the weights of ``lm`` itself, as a clause; empty where it does."""
        return self.no_changes

    def host_cache(self, lm: LM, store: TrunkCache) -> TrunkCache | None:
        """The kept trunk outputs of ``lm`` for passes through :meth:`host`; None where they do not hold for it."""
        return store

    def texts(self, lm: LM, requests: Sequence[Request]) -> list[Text]:
        """Tokenise the requests and check them; in a chat template with the end of the answer's turn.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request, or one that does not fit the model.
        """
        self.check(lm)
        if not requests:
            raise RequestError("There is nothing to edit: give at least one prompt with its target.")
        return to_texts(lm, [r.pair for r in requests], closed=True)

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> BaseEdit:
        """Make one edit: ``edit(lm, prompt, target)``, or one for several facts at once, ``edit(lm, [...])``.

        The model is not changed: use ``edit.applied(lm)``. Several facts become one edit as :meth:`together` defines
        it, which differs from making one edit for each fact and applying them all.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: an empty prompt or target, or a text that does not fit the model's context.
        """
        requests = as_requests(prompt, target)
        return Edit(self.together(lm, requests), self.origin(lm, requests))

    def origin(self, lm: LM, requests: Sequence[Request]) -> Origin:
        """The provenance of an edit of these requests."""
        return Origin(
            fingerprint=self.host(lm).fingerprint,
            model=lm.name,
            editor=self.name,
            settings=asdict(self.config),
            requests=tuple(requests),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            chat=lm.chat,
        )

    def bind(self, lm: LM) -> None:
        """Bind the editor to the model that it is trained for; training calls this first.

        Raises:
            MismatchError: it is bound to another model, or the model does not fit.
        """
        self.check(lm)
        self.fingerprint, self.chat = lm.fingerprint, lm.chat

    def check(self, lm: LM) -> None:
        """Check that the editor fits this model; warn if it was trained on prompts in another framing.

        Raises:
            MismatchError: it was trained for another model, or the model lacks one of its matrices.
        """
        if self.fingerprint and not same_model(self.fingerprint, lm.fingerprint):
            raise MismatchError(
                f"This editor was trained for a model with fingerprint {self.fingerprint}, but {lm.name!r} has "
                f"{lm.fingerprint}. {difference(self.fingerprint, lm.fingerprint)}. Train one for this model: "
                f"emendo train --model {lm.name}"
            )
        if self._checked != id(lm.model):
            for site in self.sites:
                _check_site(site, lm)
            self._checked = id(lm.model)
        if self.fingerprint and self.chat is not None and self.chat != lm.chat:
            ways = ("plain prompts", "prompts in the chat template")
            warnings.warn(
                f"This editor was trained on {ways[self.chat]}, but {lm.name} is given {ways[lm.chat]}: expect less of "
                "its edits.",
                FramingWarning,
                stacklevel=1,  # one place, so that Python shows it once
            )

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Write ``editor.safetensors``, ``editor.json`` and a card (``README.md``) into a folder, all or nothing.

        Args:
            folder: the folder.
            overwrite: replace an older editor in it.
            dtype: the number format of its matrices in the file, such as ``torch.bfloat16``, which halves the file;
                by default that of the editor. Reading converts them back.

        Raises:
            StorageError: the folder already holds something, or cannot be written.
        """
        with new_folder(folder, EDITOR, overwrite=overwrite) as new:
            self._write(new, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload the editor's folder with its card to the Hugging Face hub.

        Args:
            repo_id: such as ``"user/name"``; created where it does not exist.
            private: whether a new repository is private.
            token: a token that may write; by default that of ``hf auth login``.
            dtype: as of :meth:`save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            StorageError: the hub cannot be reached, or refuses the upload.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self._write(Path(temporary), dtype)
            return upload(Path(temporary), repo_id, private=private, token=token)

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        head = {
            "format": FORMAT,
            "editor": self.name,
            "config": asdict(self.config),
            "sites": [asdict(site) for site in self.sites],
            "fingerprint": self.fingerprint,
            "chat": self.chat,
            "info": self.info,
        }
        tensors = self.state_dict()
        if dtype is not None:  # statistics and step sizes are small, and stay exact
            tensors = {name: t.to(dtype) if t.dim() > 1 else t for name, t in tensors.items()}
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / HEAD, {**head, "checksum": _checksum(head, folder / WEIGHTS)})
        (folder / "README.md").write_text(card_of(head), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a trained editor; ``Editor.from_pretrained`` reads every method.

        Args:
            folder: its folder, the name of an editor that ships with emendo, or the id of a repository on the hub
                such as ``"user/name"`` (see :mod:`emendo.editors.library`).

        Raises:
            StorageError: a file is missing, damaged, or from a newer emendo; or another method than this class's.
        """
        from emendo.editors import editor_class

        where = find(folder)
        head = read_json(where / HEAD)
        if not isinstance(head, dict) or head.get("format") not in range(1, FORMAT + 1):
            raise StorageError(f"{where / HEAD} is not an editor that this version can read.")
        tensors = read_tensors(where / WEIGHTS)
        checksum = head.pop("checksum", None)
        if (checksum or head["format"] > 1) and checksum != _checksum(head, where / WEIGHTS):
            raise StorageError(f"{where} is damaged: its content does not match its checksum.")
        try:
            kind = editor_class(head["editor"])
            if not issubclass(kind, cls):
                raise StorageError(f"{where} holds a {head['editor']!r} editor, not {cls.name!r}.")
            return _restored(kind, head, tensors)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise StorageError(f"{where} is damaged: {error}") from error


def _checksum(head: Mapping[str, Any], weights: Path) -> str:
    """The SHA-256 of everything that is saved: the head, and the file of the weights."""
    with weights.open("rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{json.dumps(head, sort_keys=True)} {own}".encode()).hexdigest()


def _restored(kind: type[_E], head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _E:
    """The editor that was saved.

    Raises:
        TypeError: a value of another type, an unknown setting.
        ValueError: a setting out of bounds, or tensors that do not belong to such an editor.
    """
    config = kind.Config(**completed(kind.Config, head["config"]))
    sites = tuple(_site(values) for values in head["sites"])
    fingerprint, chat, info = head["fingerprint"], head.get("chat", False), head.get("info", {})
    if not (isinstance(fingerprint, str) and isinstance(chat, bool | None) and isinstance(info, dict)):
        raise TypeError("fingerprint, chat or info is of another type")
    with torch.device("meta"):  # shapes alone, so that wrong settings take no memory
        expected = kind(sites, config).state_dict()
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise ValueError(f"the tensor {name} is missing, or its shape does not fit the settings")
        if (
            torch.promote_types(tensors[name].dtype, tensor.dtype) != tensor.dtype
        ):  # a narrower one may be stored
            raise ValueError(f"the tensor {name} has a dtype that does not fit the settings")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"the tensor {name} has values that are not finite numbers")
    editor = kind(sites, config, fingerprint)
    editor.load_state_dict(tensors)  # converts what is stored in a narrower format
    editor.chat, editor.info = chat, info
    return editor.eval()


def _site(values: Mapping[str, Any]) -> Site:
    """A site from JSON values.

    Raises:
        TypeError: a value is missing or of another type.
    """
    site = Site(**values)
    for name, hint in get_type_hints(Site).items():
        value = getattr(site, name)
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise TypeError(f"{name} of a site cannot be {value!r}")
    return site


def _check_site(site: Site, lm: LM) -> None:
    """Check that the model has the matrix of a site.

    Raises:
        MismatchError: it has none of that name, or one of another shape.
    """
    try:
        weight = site.weight(lm.model)
    except AttributeError:
        raise MismatchError(f"This editor edits {site.name}, but {lm.name} has no such matrix.") from None
    if weight.is_floating_point() and tuple(weight.shape) != (
        site.d_out,
        site.d_in,
    ):  # a quantised one is packed
        raise MismatchError(
            f"This editor edits {site.name} as a matrix of shape [{site.d_out}, {site.d_in}], but {lm.name} has one "
            f"of shape {list(weight.shape)}."
        )


def as_requests(
    prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
) -> list[Request]:
    """Convert one prompt with its target, or several such pairs, to requests.

    Raises:
        RequestError: an empty prompt or target.
    """
    if isinstance(prompt, str):
        return [Request(prompt, target if target is not None else "")]
    return [r if isinstance(r, Request) else Request(*r) for r in prompt]
