"""The requests of an edit, and its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from emendo._version import __version__
from emendo.errors import RequestError
from emendo.models.framing import Pair


@dataclass(frozen=True, slots=True)
class Request:
    """One fact to edit: the model's answer to ``prompt`` becomes ``target``.

    Attributes:
        prompt: the text before the answer, exactly as typed.
        target: the new answer, exactly as typed.
        separator: the text between the two; None chooses it by the script (:func:`emendo.models.framing.separator`).

    Raises:
        RequestError: the prompt or the target is empty, or is not valid text.
    """

    prompt: str
    target: str
    separator: str | None = None

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("target", self.target)):
            if not isinstance(text, str) or not text.strip():
                raise RequestError(f"The {name} is empty: {text!r}. An edit needs a prompt and a target.")
            if not _is_unicode(text):
                raise RequestError(
                    f"The {name} {text!r} is not valid Unicode: it holds half of a surrogate pair, as text that was "
                    "decoded with the wrong encoding does. Give it as UTF-8; in an ASCII locale set PYTHONUTF8=1."
                )
        if self.separator is not None and not (
            isinstance(self.separator, str) and _is_unicode(self.separator)
        ):
            raise RequestError(f"The separator {self.separator!r} is not a text.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The request in JSON values, such as those of a ledger; other values are not read."""
        return cls(values["prompt"], values["target"], values.get("separator"))

    @property
    def pair(self) -> Pair:
        """Prompt, target and separator, to be tokenised (:func:`emendo.models.tokenization.to_texts`)."""
        return self.prompt, self.target, self.separator

    def asking(self, prompt: str) -> Self:
        """A request of the same target after another prompt."""
        return replace(self, prompt=prompt)

    def as_dict(self) -> dict[str, str]:
        """As JSON values. Without a separator it is left out, so that edits older than it keep their digests."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an edit comes from.

    Attributes:
        fingerprint: of the model that the edit belongs to.
        model: the name by which that model was loaded.
        editor: the name of the method.
        settings: the settings of the method.
        requests: the facts that were edited; empty for an imported adapter.
        date: of creation, ISO 8601 in UTC.
        version: of emendo.
        upon: digests of the edits that were active in the model when this one was made; empty for a clean model.
        chat: whether the prompts were put into the model's chat template.
    """

    fingerprint: str
    model: str
    editor: str
    settings: Mapping[str, Any]
    requests: tuple[Request, ...]
    date: str
    version: str = __version__
    upon: tuple[str, ...] = ()
    chat: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON values. ``chat`` is left out when false, so that edits older than chat keep their digests."""
        values = {**asdict(self), "requests": [request.as_dict() for request in self.requests]}
        return {key: value for key, value in values.items() if key != "chat" or value}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown, or of the wrong type.
        """
        if unknown := values.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"the unknown field {min(unknown)!r}")
        requests = tuple(Request(**request) for request in values["requests"])
        origin = cls(**{**values, "requests": requests, "upon": tuple(values.get("upon", ()))})
        for name, kind in _TYPES.items():
            if not isinstance(value := getattr(origin, name), kind):
                raise TypeError(f"{name}={value!r}")
            if isinstance(value, str) and not _is_unicode(value):
                raise ValueError(f"{name}={value!r}")
        if not all(isinstance(digest, str) for digest in origin.upon):
            raise TypeError("upon")
        return origin


_TYPES: Mapping[str, type] = {
    "fingerprint": str,
    "model": str,
    "editor": str,
    "settings": dict,
    "date": str,
    "version": str,
    "chat": bool,
}


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
