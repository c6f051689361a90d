"""What an edit was asked for, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from emendo._version import __version__
from emendo.errors import RequestError


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
        upon: digests of the edits that stood in the model while this one was made; none for a clean model.
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
        """As JSON values; plain prompts are not spoken of, so that edits of before chat keep their digests."""
        return {key: value for key, value in asdict(self).items() if key != "chat" or value}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The origin that :meth:`as_dict` gave."""
        requests = tuple(Request(**request) for request in values["requests"])
        return cls(**{**values, "requests": requests, "upon": tuple(values.get("upon", ()))})
