"""What every editor is.

A method is a subclass in a file of its own, with a frozen dataclass of settings, and one line in
:data:`emendo.editors.EDITORS`:

- :class:`~emendo.editors.gradient.GradientEditor`: its ``forward`` turns :class:`~emendo.models.capture.Factors` into
  :class:`~emendo.low_rank.LowRank`. Capture, batching, application, saving, training and evaluation
  come with it.
- :class:`Editor`: makes one change for each request in any other way (``each``), such as fine-tuning. Application,
  saving and evaluation come with it.
- An :class:`Editor` that changes no weights at all overrides ``edit`` and returns an edit of its own kind.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from emendo._outputs import EDITOR
from emendo._storage import new_folder, read_json, read_tensors, write_json, write_tensors
from emendo.data.schema import Probe
from emendo.edits.edit import BaseEdit, Edit, Origin, Request
from emendo.errors import FramingWarning, MismatchError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models._fingerprint import difference, same_model
from emendo.models.lm import LM
from emendo.models.sites import Site
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

FORMAT = 1


class Editor(nn.Module):
    """Base of all editors.

    Args:
        sites: the matrices it edits.
        config: the method's settings, a frozen dataclass.
        fingerprint: of the model it belongs to; empty for one that has seen no model yet.

    Attributes:
        name: the method's name, as on the command line.
        Config: the class of its settings.
        chat: whether it was trained on prompts in that model's chat template.
        info: how it was trained, as JSON values; saved with it.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    needs_training: ClassVar[bool] = True
    """Whether it must be trained before it can edit."""
    makes: ClassVar[type[BaseEdit]] = Edit
    """The class of its edits; where they change no weights, :meth:`each` and :meth:`together` do not exist."""

    def __init__(self, sites: tuple[Site, ...], config: Any = None, fingerprint: str = "") -> None:
        super().__init__()
        self.sites = sites
        self.config = config if config is not None else self.Config()
        self.fingerprint = fingerprint
        self.chat = False
        self.info: dict[str, Any] = {}

    @abstractmethod
    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, every one of them from the clean model.

        Returns:
            By site name, factors ``[requests, d_out, r]`` and ``[requests, r, d_in]``.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request at all, one that does not fit the model, or a method that changes no weights.
        """
        raise RequestError(
            f"{self.name} changes no weights, so it has no changes to give; ask it for an edit."
        )

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for all requests: the sum of their own (MEND, section 3.2), unless a method knows better."""
        return {name: delta.sum() for name, delta in self.each(lm, requests).items()}

    def host(self, lm: LM) -> LM:
        """The model that this editor's changes are made for: the user's own, except for a method that trains it."""
        return lm

    @property
    def shares_trunk(self) -> bool:
        """Whether the host's blocks below the first edited one are those of the user's model."""
        return True

    def observe(self, probes: Sequence[Probe]) -> None:
        """Hear of prompts with their answers that shall stay as they are; most methods do not care."""

    def texts(self, lm: LM, requests: Sequence[Request]) -> list[Text]:
        """The requests, tokenised and checked.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request at all, or one that does not fit the model.
        """
        self.check(lm)
        if not requests:
            raise RequestError("There is nothing to edit: give at least one prompt with its target.")
        return to_texts(lm, [(r.prompt, r.target) for r in requests])

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> BaseEdit:
        """Make one edit: ``edit(lm, prompt, target)``, or one for several facts at once, ``edit(lm, [...])``.

        The model is not changed: use ``edit.applied(lm)``. How several facts become one edit is the method's own
        (:meth:`together`); making them one by one and attaching them all is another thing.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: an empty prompt or target, or a text that does not fit the model's context.
        """
        requests = as_requests(prompt, target)
        return Edit(self.together(lm, requests), self.origin(lm, requests))

    def origin(self, lm: LM, requests: Sequence[Request]) -> Origin:
        """Where an edit of these requests comes from."""
        return Origin(
            fingerprint=self.host(lm).fingerprint,
            model=lm.name,
            editor=self.name,
            settings=asdict(self.config),
            requests=tuple(requests),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            chat=lm.chat,
        )

    def belong(self, lm: LM) -> None:
        """Take a model, and the way it is given its prompts, for the one that the editor is trained for.

        Raises:
            MismatchError: it belongs to another one.
        """
        self.check(lm)
        self.fingerprint, self.chat = lm.fingerprint, lm.chat

    def check(self, lm: LM) -> None:
        """Make sure that the editor belongs to this model; warn where that is given its prompts in another way.

        Raises:
            MismatchError: it was trained for another one.
        """
        if self.fingerprint and not same_model(self.fingerprint, lm.fingerprint):
            raise MismatchError(
                f"This editor was trained for a model with fingerprint {self.fingerprint}, but {lm.name!r} has "
                f"{lm.fingerprint}. {difference(self.fingerprint, lm.fingerprint)}. Train one for this model: "
                f"emendo train --model {lm.name}"
            )
        if self.fingerprint and self.chat != lm.chat:
            ways = ("plain prompts", "prompts in the chat template")
            warnings.warn(
                f"This editor was trained on {ways[self.chat]}, but {lm.name} is given {ways[lm.chat]}: expect less of "
                "its edits.",
                FramingWarning,
                stacklevel=1,  # one place, so that it is said once
            )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``editor.safetensors`` and ``editor.json`` into a folder, all or nothing.

        Raises:
            StorageError: the folder already holds something, or cannot be written.
        """
        with new_folder(folder, EDITOR, overwrite=overwrite) as new:
            write_tensors(new / "editor.safetensors", self.state_dict())
            write_json(
                new / "editor.json",
                {
                    "format": FORMAT,
                    "editor": self.name,
                    "config": asdict(self.config),
                    "sites": [asdict(site) for site in self.sites],
                    "fingerprint": self.fingerprint,
                    "chat": self.chat,
                    "info": self.info,
                },
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a trained editor from its folder; ``Editor.from_pretrained`` finds the method by itself.

        Raises:
            StorageError: a file is missing, damaged, or from a newer emendo.
        """
        from emendo.editors import editor_class

        where = Path(folder).expanduser()
        head = read_json(where / "editor.json")
        if not isinstance(head, dict) or head.get("format") not in range(1, FORMAT + 1):
            raise StorageError(f"{where / 'editor.json'} is not an editor that this version can read.")
        try:
            kind = editor_class(head["editor"])
            if not issubclass(kind, cls):
                raise StorageError(f"{where} holds a {head['editor']!r} editor, not {cls.name!r}.")
            known = {field.name for field in fields(kind.Config)}
            config = kind.Config(**{k: v for k, v in head["config"].items() if k in known})
            editor = kind(tuple(Site(**site) for site in head["sites"]), config, head["fingerprint"])
            editor.load_state_dict(read_tensors(where / "editor.safetensors"))
            editor.chat, editor.info = head.get("chat", False), head.get("info", {})
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{where} is damaged: {error}") from error
        return editor.eval()


def as_requests(
    prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
) -> list[Request]:
    """One prompt with its target, or several such pairs, as requests.

    Raises:
        RequestError: an empty prompt or target.
    """
    if isinstance(prompt, str):
        return [Request(prompt, target if target is not None else "")]
    return [r if isinstance(r, Request) else Request(*r) for r in prompt]
