"""emendo: edit language models. One input and the output you want, in; a small, reversible change, out.

Training is in :mod:`emendo.train`, measuring in :mod:`emendo.evaluate`.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from emendo._version import __version__

if TYPE_CHECKING:
    from emendo.data import Probe, Record, read_records
    from emendo.editors import Editor
    from emendo.edits.edit import Edit, Request
    from emendo.edits.fusing import fuse
    from emendo.errors import EmendoError
    from emendo.models.loading import LM, load
    from emendo.models.sites import find_sites

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the application asks

_WHERE = {
    "LM": "emendo.models.loading",
    "load": "emendo.models.loading",
    "find_sites": "emendo.models.sites",
    "fuse": "emendo.edits.fusing",
    "Edit": "emendo.edits.edit",
    "Request": "emendo.edits.edit",
    "Editor": "emendo.editors",
    "EmendoError": "emendo.errors",
    "Probe": "emendo.data",
    "Record": "emendo.data",
    "read_records": "emendo.data",
}

__all__ = [
    "LM",
    "Edit",
    "Editor",
    "EmendoError",
    "Probe",
    "Record",
    "Request",
    "__version__",
    "find_sites",
    "fuse",
    "load",
    "read_records",
]


def __getattr__(name: str) -> Any:  # so that `import emendo` does not import torch
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'emendo' has no attribute {name!r}")
