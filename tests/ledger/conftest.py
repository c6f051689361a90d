"""A fresh ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from emendo.ledger import Ledger
from ledger.samples import FINGERPRINT


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty ledger in ``tmp_path``."""
    return Ledger.create(tmp_path, FINGERPRINT, "tiny")
