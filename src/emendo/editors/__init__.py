"""Editing methods. A new one is one file here and one line in :data:`EDITORS`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from emendo._storage import folder_of
from emendo.editors import library
from emendo.editors.base import Editor
from emendo.editors.gradient import GradientEditor
from emendo.edits.base import WEIGHTS, BaseEdit, edit_head
from emendo.edits.edit import Edit
from emendo.errors import RequestError, StorageError

EDITORS = {
    "mend": "emendo.editors.mend:Mend",
    "enn": "emendo.editors.enn:Enn",
    "ke": "emendo.editors.ke:KnowledgeEditor",
    "malmen": "emendo.editors.malmen:Malmen",
    "meta-curvature": "emendo.editors.meta_curvature:MetaCurvature",
    "meta-sgd": "emendo.editors.meta_sgd:MetaSgd",
    "meta-lstm": "emendo.editors.meta_lstm:MetaLstm",
    "ft": "emendo.editors.ft:FineTuning",
    "ft-kl": "emendo.editors.ft_kl:FineTuningKl",
    "ft-constrained": "emendo.editors.ft_constrained:ConstrainedFineTuning",
    "ft-penalised": "emendo.editors.ft_penalised:PenalisedFineTuning",
    "diff-pruning": "emendo.editors.diff_pruning:DiffPruning",
    "ewc": "emendo.editors.ewc:Ewc",
    "lora": "emendo.editors.lora:Lora",
    "locft": "emendo.editors.locft:Locft",
    "crisp": "emendo.editors.crisp:Crisp",
    "rome": "emendo.editors.rome:Rome",
    "joint-rome": "emendo.editors.joint_rome:JointRome",
    "memit": "emendo.editors.memit:Memit",
    "alphaedit": "emendo.editors.alphaedit:AlphaEdit",
    "ultraedit": "emendo.editors.ultraedit:UltraEdit",
    "repair": "emendo.editors.repair:Repair",
    "k-adapter": "emendo.editors.k_adapter:KAdapter",
    "cache": "emendo.editors.cache:Cache",
    "in-context": "emendo.editors.in_context:InContext",
}
"""Method name -> its class, imported on first use."""
DEFAULT = "rome"
"""The method for a model without a trained editor: the best of those that need no training (docs/editors.md)."""


def editor_class(name: str) -> type[Editor]:
    """The class of a method by its name.

    Raises:
        RequestError: there is no such method.
    """
    if name not in EDITORS:
        raise RequestError(f"There is no editor {name!r}; there are: {', '.join(EDITORS)}.")
    module, _, attribute = EDITORS[name].partition(":")
    kind: type[Editor] = getattr(import_module(module), attribute)
    return kind


def trained_class(name: str) -> type[GradientEditor]:
    """The class of a method that must be trained.

    Raises:
        RequestError: there is no such method, or it needs no training.
    """
    kind = editor_class(name)
    if not issubclass(kind, GradientEditor):
        raise RequestError(
            f"{name} needs no training. Use it at once: emendo edit --editor {name} PROMPT TARGET"
        )
    return kind


def read_edit(folder: str | Path) -> BaseEdit:
    """Read an edit of any kind from its folder or from the hub (``"user/name"``).

    Raises:
        StorageError: a file is missing, damaged, or from a newer emendo, or the method is not known.
    """
    where = folder_of(folder)
    head = edit_head(where)
    if head.get("kind", WEIGHTS) == WEIGHTS:
        return Edit.from_pretrained(where)
    origin = head.get("origin")
    name = origin.get("editor") if isinstance(origin, dict) else None
    if name not in EDITORS:
        raise StorageError(
            f"{where / 'edit.json'} names the editor {name!r}; there are: {', '.join(EDITORS)}."
        )
    return editor_class(name).makes.from_pretrained(where)


__all__ = [
    "DEFAULT",
    "EDITORS",
    "Editor",
    "GradientEditor",
    "editor_class",
    "library",
    "read_edit",
    "trained_class",
]
