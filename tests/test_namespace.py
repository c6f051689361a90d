"""The public namespace: the names of ``emendo``, and which modules are public."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import emendo

PACKAGE = Path(emendo.__file__).parent
NAMES = [
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
ROOMS = ("models", "edits", "editors", "data", "train", "evaluate", "report", "ledger")


def test_the_names_of_emendo() -> None:
    assert sorted(emendo.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(emendo, name) is not None


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_what_is_public(room: str) -> None:
    module = import_module(f"emendo.{room}")
    assert module.__doc__
    assert [*module.__all__]
    for name in module.__all__:
        assert not name.startswith("_")
        assert getattr(module, name) is not None


def test_import_does_not_load_torch() -> None:
    program = "import sys, emendo; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_is_silent_by_default() -> None:
    program = "import logging, emendo; logging.getLogger('emendo.train').warning('a message')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
