"""The public namespace: the names of ``emendo``, and which modules are public."""

from __future__ import annotations

import re
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
ROOMS = ("models", "edits", "editors", "data", "train", "evaluate", "report", "ledger", "memory", "serve")


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


def test_nobody_asks_an_editor_what_kind_it_is() -> None:
    """Callers outside the room use what an editor hands out, such as ``no_changes``."""
    root = PACKAGE.parents[1]
    question = re.compile(
        r"(isinstance|issubclass)\([^)]*(Editor|FineTuning|Mend|Enn|Lora|Cache|InContext|Meta\w+)\b|"
        r"\.makes\b|changes_weights|\bhost is (not )?lm\b|\.host\([^)]*\) is |\beditor\.name [!=]="
    )
    assert question.search("if isinstance(editor, GradientEditor):") and question.search("if host is lm:")
    asked = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for folder in ("src/emendo", "reproduction", "scripts", "benchmarks", "examples")
        for path in sorted((root / folder).rglob("*.py"))
        if path.parent != PACKAGE / "editors"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if question.search(line)
    ]
    assert asked == []


def test_import_does_not_load_torch() -> None:
    program = "import sys, emendo; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_is_silent_by_default() -> None:
    program = "import logging, emendo; logging.getLogger('emendo.train').warning('a message')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
