"""The whole state of a training run in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emendo._settings import completed
from emendo._storage import new_file
from emendo.editors.base import Editor
from emendo.errors import StorageError
from emendo.models._fingerprint import same_model

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """The state of a run besides its tensors.

    Attributes:
        step: optimiser steps done.
        observed: training facts whose factors the editor has taken its statistics of.
        seconds: time spent, over all sessions.
        best: highest validation score so far.
        best_loss: the validation loss of the kept editor.
        stale: validations since that one.
        validated: step of the latest validation.
        bad: number of steps skipped for a non-finite value.
        bad_in_a_row: the same since the last good step.
        recent: outcomes of the last steps; the reported figures are their means.
        history: a row of figures for each report.
        settings: of the run; a resumed run must have the same.
    """

    step: int = 0
    observed: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_loss: float = float("inf")
    stale: int = 0
    validated: int = 0
    bad: int = 0
    bad_in_a_row: int = 0
    recent: list[dict[str, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path, state: State, editor: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]
) -> None:
    """Write a checkpoint; on failure the previous one is kept.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {f"editor.{name}": tensor for name, tensor in editor.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    with new_file(folder / FILE) as temporary:
        save_file(
            {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
            temporary,
            metadata={"state": json.dumps(asdict(state))},
        )


def load(
    folder: Path, settings: dict[str, Any], editor: Editor, optimizer: torch.optim.Optimizer
) -> tuple[State, dict[str, Tensor]]:
    """Restore the editor and the optimiser in place; returns the state and the best editor's tensors.

    Raises:
        StorageError: there is no checkpoint, it is damaged, or its run had other settings.
    """
    path = folder / FILE
    if not path.exists():
        raise StorageError(f"{folder} has no checkpoint to resume from ({FILE}).")
    try:
        with safe_open(path, framework="pt") as file:
            state = State(**json.loads(file.metadata()["state"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is damaged and cannot be resumed: {error}") from error
    if same_model(str(state.settings.get("model")), str(settings.get("model"))):
        state.settings["model"] = settings["model"]  # the same one, in an older form of its fingerprint
    if isinstance(saved := state.settings.get("config"), dict):
        state.settings["config"] = completed(type(editor.config), saved)
    if state.settings != settings:
        other = [
            f"{name}: {state.settings.get(name)!r} before, {settings.get(name)!r} now"
            for name in settings | state.settings
            if state.settings.get(name) != settings.get(name)
        ]
        raise StorageError(f"{folder} holds a run of other settings ({'; '.join(other)}).")
    parts: dict[str, dict[str, Tensor]] = {"editor": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    editor.load_state_dict(parts["editor"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    full = optimizer.state_dict()
    optimizer.load_state_dict({**full, "state": moments})
    return state, parts["best"]
