"""Edits merged into whole checkpoints, which any software loads."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from emendo._outputs import CHECKPOINT
from emendo._storage import new_folder, write_json
from emendo._version import __version__
from emendo.edits._weights import Merged, merge
from emendo.edits.edit import Edit
from emendo.errors import ModelError
from emendo.models.lm import LM
from emendo.models.offloading import refuse_offloaded


def to_merged(
    edit: Edit, lm: LM, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Merged:
    """Write a whole checkpoint with the edit merged into its weights, and the tokenizer.

    The settings of the model's processor (for images and sound) are copied from the folder of the model.

    Args:
        edit: the edit.
        lm: the model; its weights are changed during the call and restored bit for bit.
        folder: the checkpoint's folder.
        dtype: of the checkpoint; by default that of the model.
        overwrite: replace the content of the folder.

    Returns:
        The rounding error of the merge in that dtype.

    Raises:
        MismatchError: the edit belongs to another model.
        ModelError: a matrix is quantised, or transformers cannot save the model.
        RequestError: the edit holds NaN or infinite numbers, or weights of the model are offloaded.
        StorageError: the folder is not empty, or cannot be written.
    """
    edit.check(lm)
    edit.check_numbers()
    refuse_offloaded(lm.model, "Merging an edit")
    with new_folder(folder, CHECKPOINT, overwrite=overwrite) as new:
        if dtype is None or dtype == lm.model.dtype:
            merged = merge(lm.model, edit.deltas)
            try:
                _save(lm.model, new)
            finally:
                merged.restore()
        else:
            model = copy.deepcopy(lm.model).to(dtype)
            merged = merge(model, edit.deltas, keep=False)
            _save(model, new)
        lm.tokenizer.save_pretrained(new)
        _copy_processor(lm, new)
        head = {"version": __version__, "form": "merged", "merge_loss": merged.loss}
        write_json(new / "emendo.json", {**head, "fingerprint": edit.origin.fingerprint})
    return merged


def _copy_processor(lm: LM, folder: Path) -> None:
    """Copy the settings of what turns images and sound into a model's inputs, which its tokenizer does not have."""
    if lm.files is not None:
        for file in lm.files.source.glob("*processor_config.json"):
            shutil.copyfile(file, folder / file.name)


def _save(model: Any, folder: Path) -> None:
    """Save a model with transformers, which refuses some of its own settings (such as those for generation)."""
    try:
        model.save_pretrained(folder)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"transformers cannot save this model as a checkpoint: {error}") from error
