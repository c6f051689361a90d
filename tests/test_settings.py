"""Settings: one place for a default, its bounds, its option and its row in the documentation."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from emendo._settings import Settings, parse_settings, setting, settings_of, settings_table
from emendo.cli import train
from emendo.cli._settings_page import with_tables
from emendo.editors import EDITORS, editor_class
from emendo.errors import RequestError
from emendo.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Example(Settings):
    count: int = setting(3, "A count.", least=1)
    share: float = setting(0.5, "A share.", least=0, most=1)
    rate: float | None = setting(None, "A rate.", above=0, unset="by size")
    mode: Literal["a", "b"] = setting("a", "A mode.")
    flag: bool = setting(True, "A flag.")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 0}, "count must be at least 1, not 0."),
        ({"count": 1.5}, "count must be a whole number, not 1.5."),
        ({"count": True}, "count must be a whole number, not True."),
        ({"count": 2**63}, "count must be at most 9223372036854775807"),
        ({"share": 1.5}, "share must be between 0 and 1, not 1.5."),
        ({"share": float("nan")}, "share must be a number, not nan."),
        ({"share": None}, "share must be a number, not None."),
        ({"rate": 0}, "rate must be above 0, not 0."),
        ({"rate": float("inf")}, "rate must be at most"),
        ({"rate": "x"}, "rate must be a number or none, not 'x'."),
        ({"mode": "c"}, "mode must be one of a, b, not 'c'."),
        ({"mode": []}, "mode must be one of a, b, not []."),
        ({"flag": 1}, "flag must be true or false, not 1."),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as error:
        Example(**values)
    assert words in str(error.value)


def test_values_from_texts() -> None:
    pairs = ["count=4", "share = 0.25", "rate=none", "mode=b", "flag=off"]
    assert parse_settings(Example, pairs, "--set", "no setting") == Example(4, 0.25, None, "b", False)
    for pair, words in {
        "cuont=3": "no setting 'cuont'; did you mean 'count'? There are: count (a whole number); share",
        "count": "a setting is KEY=VALUE",
        "count=3.5": "--set count=3.5: '3.5' is not a whole number.",
        "count=" + "9" * 5000: "is not a whole number",
        "mode=c": "'c' is not one of a, b.",
        "flag=perhaps": "'perhaps' is not true or false.",
    }.items():
        with pytest.raises(RequestError) as error:
            parse_settings(Example, [pair], "--set", "no setting")
        assert words in str(error.value)


def test_the_table() -> None:
    assert settings_table(Example).splitlines()[2:] == [
        "| `count` | 3 | A count. |",
        "| `share` | 0.5 | A share. |",
        "| `rate` | by size | A rate. |",
        "| `mode` | a | A mode. One of `a`, `b`. |",
        "| `flag` | true | A flag. |",
    ]


def test_every_setting_is_described_and_its_default_allowed() -> None:
    for kind in (TrainConfig, *(editor_class(name).Config for name in EDITORS)):
        assert all(own.help.endswith(".") for own in settings_of(kind)), kind
        assert asdict(kind()).keys() == {own.name for own in settings_of(kind)}


def test_every_training_setting_is_an_option() -> None:
    parameters = inspect.signature(train.run).parameters
    for own in settings_of(TrainConfig):
        assert parameters[own.flag.removeprefix("--").replace("-", "_")].default is None
    with pytest.raises(RequestError, match="--text-examples must be at least 0"):
        TrainConfig(text=-1)


def test_the_documentation_has_these_tables() -> None:
    page = (Path(__file__).parent.parent / "docs" / "editors.md").read_text(encoding="utf-8")
    assert page == with_tables(page), "renew it: python -m emendo.cli._settings_page"
