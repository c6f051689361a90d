"""Cells: one editor on one task, with everything that its figures depend on, and the folder that keeps them.

A cell's figures are in ``cells/DIGEST.json`` and its trained editor in ``editors/DIGEST``, where the digest covers
exactly the inputs. So nothing is computed twice: tables share their common cells, cells that differ only in their test
data share an editor, and a stopped run resumes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from emendo._storage import digest, new_file, read_json, write_json
from emendo.editors import editor_class
from emendo.errors import StorageError
from emendo.evaluate.intervals import Interval
from emendo.train import TrainConfig
from reproduction.mend_paper.figures import Figures

VERSION = 2
"""The version of the measurements; figures of another version are measured again."""


@dataclass(frozen=True, slots=True)
class Match:
    """The radius of a cache, as a multiple of the one whose drawdown is that of another cell (MEND, appendix G).

    Attributes:
        cell: the other cell.
        times: the multiple.
    """

    cell: Cell
    times: float = 1.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One editor on one task.

    Attributes:
        task: the task's name.
        editor: the method's name.
        settings: of the method, where they are not its defaults.
        sites: which matrices, as for :func:`emendo.models.sites.find_sites`.
        last: the number of blocks; None takes the default.
        k: the number of facts in one edit.
        trained_for: the number of facts in one edit during training; None takes ``k``.
        training: of :class:`emendo.train.TrainConfig`, where they are not its defaults; not used without training.
        facts: the number of test facts.
        seed: of the editor's initial parameters and of the order of the facts.
        dtype: of the model.
        match: determines the cache's radius.
        shipped: the name of a trained editor to take instead of training one; it has its own settings.
    """

    task: str
    editor: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sites: str | tuple[str, ...] = "mlp"
    last: int | None = None
    k: int = 1
    trained_for: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    facts: int = 100
    seed: int = 0
    dtype: str = "float32"
    match: Match | None = None
    shipped: str = ""

    def config(self) -> Any:
        """The settings of the method, defaults included; a method with a seed of its own gets the cell's."""
        kind = editor_class(self.editor).Config
        drawn = {"seed": self.seed} if "seed" in {known.name for known in fields(kind)} else {}
        return kind(**{**drawn, **self.settings})

    def train_config(self) -> TrainConfig:
        """The settings of its training, defaults included; as in the paper, locality texts come from the task alone."""
        own = {"together": self.trained_for or self.k, "seed": self.seed}
        return TrainConfig(**{"text": 0, **self.training, **own})

    @property
    def trained(self) -> bool:
        """Whether an editor must be trained."""
        return editor_class(self.editor).needs_training and not self.shipped

    def plan(self) -> dict[str, Any]:
        """All its settings, known before the model is loaded, as JSON values."""
        return {
            "task": self.task,
            "editor": self.editor,
            "settings": asdict(self.config()),
            "sites": self.sites,
            "last": self.last,
            "k": self.k,
            "training": _without(asdict(self.train_config()), "checkpoint_every") if self.trained else None,
            "facts": self.facts,
            "seed": self.seed if self.trained else None,
            "dtype": self.dtype,
            "match": self.match and {"cell": self.match.cell.plan(), "times": self.match.times},
            "version": VERSION,
            **({"shipped": self.shipped} if self.shipped else {}),
        }

    def key(self, model: str, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Everything that its figures depend on.

        Args:
            model: the model's fingerprint.
            sizes: the number of items of each kind of data of its task.
        """
        return {**self.plan(), "fingerprint": model, "sizes": dict(sizes)}

    def editor_key(self, model: str, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Everything that its trained editor depends on."""
        sizes = {name: size for name, size in sizes.items() if not name.startswith("test")}
        return _without(self.key(model, sizes), "facts", "k", "match", "version")


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a cell.

    Attributes:
        figures: see :data:`reproduction.mend_paper.figures.PROTOCOL`.
        training: seconds, steps, parameters and the reason it stopped; empty if nothing was trained.
        seconds: the time of the measurement.
        note: a remark, such as the radius that was found.
    """

    figures: Figures
    training: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""


class Folder:
    """The folder of a comparison: ``cells/``, ``editors/`` and the pages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def cell(self, key: Mapping[str, Any]) -> Path:
        """The file of a cell's figures."""
        return self.path / "cells" / f"{digest(key)}.json"

    def editor(self, key: Mapping[str, Any]) -> Path:
        """The folder of a trained editor."""
        return self.path / "editors" / digest(key)

    def radius(self, key: Mapping[str, Any]) -> Path:
        """The file of the radius that was found for a cache; cells that take multiples of it share the file."""
        match = {**key["match"], "times": 1.0}
        return self.path / "radii" / f"{digest({**_without(key, 'facts'), 'match': match})}.json"

    def write(self, key: Mapping[str, Any], result: Result, about: Mapping[str, Any]) -> None:
        """Keep a cell's figures.

        Raises:
            StorageError: they cannot be written.
        """
        with new_file(self.cell(key)) as temporary:
            write_json(
                temporary,
                {
                    "cell": dict(key),
                    "figures": finite(result),
                    "training": dict(result.training),
                    "seconds": result.seconds,
                    "note": result.note,
                    "about": dict(about),
                },
            )

    def read(self, key: Mapping[str, Any]) -> Result | None:
        """A cell's figures; None if it has none yet.

        Raises:
            StorageError: its file is damaged.
        """
        path = self.cell(key)
        return _read(path)[1] if path.exists() else None

    def latest(self) -> dict[str, Result]:
        """Every cell's latest figures by the digest of its plan, for any model and data.

        Raises:
            StorageError: a file is damaged.
        """
        found = {}
        for file in sorted(self.path.glob("cells/*.json"), key=lambda file: file.stat().st_mtime):
            key, result = _read(file)
            found[digest(_without(key, "fingerprint", "sizes"))] = result
        return found


def with_seed(cell: Cell, seed: int) -> Cell:
    """The same cell with another seed, and the cell it is matched with too."""
    match = cell.match and replace(cell.match, cell=with_seed(cell.match.cell, seed))
    return replace(cell, seed=seed, match=match)


def _read(file: Path) -> tuple[dict[str, Any], Result]:
    """A cell's key and its figures."""
    raw = read_json(file)
    try:
        figures = {name: _interval(value) for name, value in raw["figures"].items()}
        return dict(raw["cell"]), Result(figures, raw["training"], raw["seconds"], raw["note"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{file} is damaged: it holds no cell of a comparison. Remove it to run that cell again."
        ) from error


def finite(result: Result) -> dict[str, dict[str, float | None]]:
    """Figures as JSON values; JSON has no infinity and no NaN, so those become null."""
    return {
        name: {part: x if math.isfinite(x) else None for part, x in value.as_dict().items()}
        for name, value in result.figures.items()
    }


def _interval(value: Mapping[str, float | None]) -> Interval:
    return Interval(*(math.nan if value[name] is None else value[name] for name in ("mean", "low", "high")))  # type: ignore[arg-type]


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
