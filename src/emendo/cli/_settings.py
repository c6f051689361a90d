"""What a training run was asked to do, from the command line or from the run's own file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from emendo.editors import editor_class
from emendo.errors import RequestError
from emendo.models.loading import BUILT_IN
from emendo.train import TrainConfig

_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_TEXT_EXAMPLES = "text_examples"
"""The option of ``TrainConfig.text``: ``--text`` names the file."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that makes a training run what it is; as JSON values in the run's ``run.json``.

    Attributes:
        model: name or absolute folder.
        data: ``"atlas"`` or an absolute path.
        validation: an absolute path; None holds out a part of ``data``.
        limit: use the first so many records.
        skip_bad: leave malformed records out.
        text: a plain text file for the locality loss; None leaves a decoder to write its own.
        dtype: of the model.
        device: of the model.
        editor: the method's name.
        editor_settings: all settings of the method.
        sites: what ``--sites`` said.
        last: what ``--last`` said.
        training: all of :class:`emendo.train.TrainConfig`.
        chat: put prompts into the model's chat template.
    """

    model: str
    data: str
    validation: str | None
    limit: int | None
    skip_bad: bool
    text: str | None
    dtype: str
    device: str | None
    editor: str
    editor_settings: dict[str, Any]
    sites: list[str]
    last: int | None
    training: dict[str, Any]
    chat: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RunSettings:
        """From the options of ``emendo train`` by name; one that is None or missing takes its default.

        Raises:
            RequestError: an option that makes no sense.
        """
        got = {name: value for name, value in options.items() if value is not None}
        if "limit" in got and got["limit"] < 1:
            raise RequestError(f"--limit must be at least 1, not {got['limit']}.")
        names = {field.name for field in fields(TrainConfig)} - {"text"}
        training = {name: value for name, value in got.items() if name in names}
        if _TEXT_EXAMPLES in got:
            training["text"] = got[_TEXT_EXAMPLES]
        pairs = [*(got.get("settings") or []), *([f"rank={got['rank']}"] if "rank" in got else [])]
        return cls(
            model=_place(got["model"], *BUILT_IN),
            data=_place(got["data"], "atlas"),
            validation=_place(got["validation"]) if "validation" in got else None,
            limit=got.get("limit"),
            skip_bad=got.get("skip_bad", False),
            text=_place(got["text"]) if "text" in got else None,
            dtype=got["dtype"],
            device=got.get("device"),
            editor=got["editor"],
            editor_settings=asdict(editor_config(got["editor"], pairs)),
            sites=list(got.get("sites") or ["mlp"]),
            last=got.get("last"),
            training=asdict(TrainConfig(**training)),
            chat=got.get("chat", False),
        )

    @property
    def config(self) -> TrainConfig:
        """The training loop's settings."""
        return TrainConfig(**self.training)


def site_choice(sites: Sequence[str]) -> str | list[str]:
    """What :func:`emendo.models.sites.find_sites` takes, from what ``--sites`` said.

    Raises:
        RequestError: a group and a pattern together.
    """
    groups = [name for name in sites if name in ("mlp", "attention", "all")]
    if not groups:
        return list(sites)
    if len(sites) > 1:
        raise RequestError(
            f"--sites {groups[0]} stands alone; to mix, give patterns only, such as '*.down_proj'."
        )
    return groups[0]


def editor_config(editor: str, pairs: Sequence[str]) -> Any:
    """A method's settings from ``key=value`` texts.

    Raises:
        RequestError: there is no such method or key, or the value does not fit.
    """
    return as_settings(editor_class(editor).Config, pairs, "--set", f"the {editor} editor has no setting")


def as_settings(kind: type[Any], pairs: Sequence[str], option: str, unknown: str) -> Any:
    """A dataclass of settings from ``key=value`` texts.

    Args:
        kind: the dataclass.
        pairs: the texts.
        option: that they were given with.
        unknown: what to say of a key that there is not, before the key.

    Raises:
        RequestError: there is no such key, or the value does not fit.
    """
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            raise RequestError(
                f"{option} {pair}: "
                + (f"{unknown} {key!r}" if equals else "a setting is KEY=VALUE")
                + (f"; did you mean {near[0]!r}? " if near else ". ")
                + "There are: "
                + "; ".join(f"{name} ({_allowed(hint)})" for name, hint in types.items())
                + "."
            )
        values[key] = _value(f"{option} {pair}", types[key], text)
    return kind(**values)


def _value(given: str, hint: Any, text: str) -> Any:
    if isinstance(hint, UnionType):
        (kind,) = (part for part in get_args(hint) if part is not NoneType)
        return None if text.lower() == "none" else _value(given, kind, text)
    try:
        if hint is bool:
            return _WORDS[text.lower()]
        if get_origin(hint) is Literal:
            return {str(choice): choice for choice in get_args(hint)}[text]
        return hint(text)
    except (KeyError, ValueError):
        raise RequestError(f"{given}: {text!r} is not {_allowed(hint)}.") from None


def _allowed(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join("none" if part is NoneType else _allowed(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, getattr(hint, "__name__", ""))


def _place(name: str | Path, *known: str) -> str:
    """A path as an absolute one, so that a run can be resumed from anywhere; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if str(name) not in known and path.exists() else str(name)
