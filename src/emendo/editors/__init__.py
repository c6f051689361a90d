"""Editing methods. A new one is one file here and one line in :data:`EDITORS`."""

from __future__ import annotations

from importlib import import_module

from emendo.editors.base import Editor, GradientEditor
from emendo.errors import RequestError

EDITORS = {
    "mend": "emendo.editors.mend:Mend",
}
"""Method name -> where its class is; imported when it is asked for."""


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


__all__ = ["EDITORS", "Editor", "GradientEditor", "editor_class"]
