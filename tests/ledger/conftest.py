"""A fresh ledger."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from emendo.ledger import Ledger
from ledger.samples import FINGERPRINT, MEMORY


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Pytest's, in memory."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty ledger in ``tmp_path``."""
    return Ledger.create(tmp_path, FINGERPRINT, "tiny")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that anybody can reach, unlike ``tmp_path``."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)
