"""The settings of a training run, from the command line or from the run's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emendo._settings import parse_settings
from emendo.editors import editor_class
from emendo.errors import RequestError
from emendo.models.loading import BUILT_IN
from emendo.train import TrainConfig
from emendo.train.presets import preset_options

_TEXT_EXAMPLES = "text_examples"
"""The option of ``TrainConfig.text``: ``--text`` names the file."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that defines a training run, as JSON values in its ``run.json``.

    Attributes:
        model: name or absolute folder.
        data: ``"atlas"`` or an absolute path.
        validation: an absolute path; None holds out a part of ``data``.
        limit: use only this many records, the first ones.
        skip_bad: leave malformed records out.
        text: a plain text file for the locality loss; None: a decoder writes its own text.
        dtype: of the model.
        device: of the model.
        editor: the method's name.
        editor_settings: all settings of the method.
        sites: the values of ``--sites``.
        last: the value of ``--last``.
        training: all of :class:`emendo.train.TrainConfig`.
        chat: put prompts into the model's chat template.
        offload: leave the model's blocks in its files.
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
    offload: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RunSettings:
        """From the options of ``emendo train`` by name; one that is None or missing takes its default.

        Raises:
            RequestError: a value that is not allowed.
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
            offload=got.get("offload", False),
        )

    @property
    def config(self) -> TrainConfig:
        """The training loop's settings."""
        return TrainConfig(**self.training)


def with_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a preset stands for, overridden by those that were given.

    Raises:
        RequestError: there is no such preset, or it stands for a model that must be given.
    """
    preset = preset_options(name)
    if "model" not in preset and "model" not in given:
        raise RequestError(
            f"--preset {name} needs --model FOLDER: the paper edits a checkpoint of De Cao et al. (2021), which "
            "docs/how-to/paper-models.md says how to convert."
        )
    settings = [*preset["settings"], *(given.get("settings") or [])]
    if given.get("editor", preset["editor"]) != preset["editor"]:
        raise RequestError(f"--preset {name} is for {preset['editor']}: leave --editor out.")
    return {**preset, **given, "settings": settings}


def site_choice(sites: Sequence[str]) -> str | list[str]:
    """The values of ``--sites`` as the argument of :func:`emendo.models.sites.find_sites`.

    Raises:
        RequestError: a group and a pattern together.
    """
    groups = [name for name in sites if name in ("mlp", "attention", "all")]
    if not groups:
        return list(sites)
    if len(sites) > 1:
        raise RequestError(
            f"--sites {groups[0]} cannot be combined; to combine, give patterns only, such as '*.down_proj'."
        )
    return groups[0]


def editor_config(editor: str, pairs: Sequence[str]) -> Any:
    """The settings of a method from ``key=value`` texts.

    Raises:
        RequestError: there is no such method or key, or the value does not fit.
    """
    return parse_settings(editor_class(editor).Config, pairs, "--set", f"the {editor} editor has no setting")


def _place(name: str | Path, *known: str) -> str:
    """An absolute path for a path, so that a run can be resumed from anywhere; other names unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if str(name) not in known and path.exists() else str(name)
