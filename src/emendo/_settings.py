"""Settings: dataclasses whose fields carry their description and their bounds.

::

    @dataclass(frozen=True, slots=True)
    class LoraConfig(Settings):
        rank: int = setting(8, "Rank of the change of each matrix.", least=1)

Validation, ``--set rank=4``, the options of a command with their help, and the tables of the documentation are all
made from these fields, so a setting stands in one place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from emendo.errors import RequestError

_T = TypeVar("_T")
_LARGEST = 2**63 - 1
_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    unset: str = "",
    flag: str = "",
    before: Any = None,
) -> Any:
    """A field of a settings class.

    Args:
        default: its default.
        help: its effect, as a sentence.
        least: smallest allowed value.
        above: every allowed value is larger than this.
        most: largest allowed value.
        unset: the meaning of None as the default.
        flag: its option on the command line, where that is not the field's name.
        before: its value in files from before the setting existed, where that is not the default.
    """
    metadata = {"help": help, "least": least, "above": above, "most": most, "unset": unset, "flag": flag}
    metadata["before"] = default if before is None else before
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a class of settings.

    Attributes:
        name: of the field.
        flag: its option on the command line, such as ``--c-edit``.
        hint: its type.
        default: its default.
        help: its effect.
        unset: the meaning of None as the default.
    """

    name: str
    flag: str
    hint: Any
    default: Any
    help: str
    unset: str
    least: float | None
    above: float | None
    most: float | None

    @property
    def kind(self) -> Any:
        """The type without None."""
        if isinstance(self.hint, UnionType):
            return next(part for part in get_args(self.hint) if part is not NoneType)
        return self.hint

    @property
    def allowed(self) -> str:
        """The allowed type in words."""
        choices = get_args(self.kind) if get_origin(self.kind) is Literal else ()
        words = f"one of {', '.join(choices)}" if choices else _KINDS[self.kind]
        return f"{words} or none" if self.kind is not self.hint else words

    @property
    def shown_default(self) -> str:
        """The default in words."""
        if self.default is None:
            return self.unset or "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default).lower()

    def problem(self, value: Any) -> str | None:
        """The problem with a value, as the end of a sentence; None if the value is allowed."""
        if value is None and self.kind is not self.hint:
            return None
        if not self._fits(value):
            return f"must be {self.allowed}, not {value!r}"
        if isinstance(value, bool | str):
            return None
        if math.isnan(value):
            return "must be a number, not nan"
        if self.least is not None and self.most is not None and not self.least <= value <= self.most:
            return f"must be between {self.least} and {self.most}, not {value}"
        if self.least is not None and not value >= self.least:
            return f"must be at least {self.least}, not {value}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above}, not {value}"
        most = self.most if self.most is not None else _LARGEST
        if not value <= most or not math.isfinite(value):
            return f"must be at most {most}, not {value}"
        return f"must be at least {-_LARGEST}, not {value}" if value < -_LARGEST else None

    def _fits(self, value: Any) -> bool:
        if get_origin(self.kind) is Literal:
            return value in get_args(self.kind) and isinstance(value, str)
        if self.kind in (int, float):
            return isinstance(value, (int, float) if self.kind is float else int) and not isinstance(
                value, bool
            )
        return isinstance(value, self.kind)

    def read(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            ValueError: it stands for none.
        """
        if self.kind is not self.hint and text.lower() == "none":
            return None
        if self.kind is bool:
            if text.lower() not in _BOOLEANS:
                raise ValueError(text)
            return _BOOLEANS[text.lower()]
        if get_origin(self.kind) is Literal:
            if text not in get_args(self.kind):
                raise ValueError(text)
            return text
        return self.kind(text)


class Settings:
    """Base of frozen dataclasses of settings: checks every value when one is made.

    Raises:
        RequestError: a value of another type or out of bounds.
    """

    __slots__ = ()
    names_are_options: ClassVar[bool] = False
    """Whether messages name ``--c-edit`` instead of ``c_edit``."""

    def __post_init__(self) -> None:
        for own in settings_of(type(self)):
            if (problem := own.problem(getattr(self, own.name))) is not None:
                raise RequestError(f"{own.flag if self.names_are_options else own.name} {problem}.")
        self._check()

    def _check(self) -> None:
        """Check what several settings must be together."""


def parse_settings(kind: type[_T], pairs: Sequence[str], option: str, unknown: str) -> _T:
    """A dataclass of settings from ``key=value`` texts.

    Args:
        kind: the dataclass.
        pairs: the texts.
        option: the option that they were given with, such as ``--set``.
        unknown: the message for an unknown key, before the key.

    Raises:
        RequestError: an unknown key, or a value that does not fit.
    """
    known = {own.name: own for own in settings_of(kind)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise RequestError(
                f"{option} {pair}: "
                + (f"{unknown} {key!r}" if equals else "a setting is KEY=VALUE")
                + (f"; did you mean {near[0]!r}? " if near else ". ")
                + "There are: "
                + "; ".join(f"{name} ({own.allowed})" for name, own in known.items())
                + "."
            )
        try:
            values[key] = known[key].read(text)
        except ValueError:
            raise RequestError(f"{option} {pair}: {text!r} is not {known[key].allowed}.") from None
    return kind(**values)


def settings_of(kind: type[Any]) -> tuple[Setting, ...]:
    """The settings of a dataclass, in order."""
    return tuple(_settings(kind))


def _settings(kind: type[Any]) -> Iterator[Setting]:
    hints = get_type_hints(kind)
    for own in fields(kind):
        values = {
            "help": "",
            "unset": "",
            "flag": "",
            "least": None,
            "above": None,
            "most": None,
            **{name: value for name, value in own.metadata.items() if name != "before"},
        }
        values["flag"] = values["flag"] or f"--{own.name.replace('_', '-')}"
        yield Setting(name=own.name, hint=hints[own.name], default=own.default, **values)


def completed(kind: type[Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, and those that did not exist when they were saved at their value of that time."""
    return {own.name: own.metadata.get("before", own.default) for own in fields(kind)} | dict(saved)


def settings_table(kind: type[Any]) -> str:
    """The settings as a Markdown table; options instead of names where the class names options."""
    option = getattr(kind, "names_are_options", False)
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for own in settings_of(kind):
        choices = get_args(own.kind) if get_origin(own.kind) is Literal else ()
        also = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        rows.append(f"| `{own.flag if option else own.name}` | {own.shown_default} | {own.help}{also} |")
    return "\n".join(rows)
