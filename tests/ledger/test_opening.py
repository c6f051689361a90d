"""Beginning a ledger, and opening one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emendo.errors import MismatchError, RequestError, StorageError
from emendo.ledger import Ledger
from ledger.samples import FINGERPRINT, filled


def test_another_models_ledger(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match="'tiny' with fingerprint 00f1a9, but the model at hand has fingerprint beef"
    ):
        Ledger.open(tmp_path, "beef")


def test_there_is_one_already(ledger: Ledger, tmp_path: Path) -> None:
    filled(ledger, 1)
    with pytest.raises(StorageError, match=r"a ledger of 'tiny' at .* already"):
        Ledger.create(tmp_path, FINGERPRINT, "tiny")
    assert len(ledger.active) == 1


def test_a_url_of_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sub/edits.db"
    filled(Ledger.create(url, FINGERPRINT, "tiny"), 1)
    assert (tmp_path / "sub" / "edits.db").is_file()
    assert Ledger.open(url).head.id == 1


def test_folders_with_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c%20d é"
    filled(Ledger.create(folder, FINGERPRINT, "tiny"), 1)
    assert (folder / "ledger.sqlite").is_file()
    assert Ledger.open(str(folder)).head.id == 1


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("nonsense://host/x", "kind 'nonsense'; supported are sqlite"),
        ("oracle://host/x", "supported are"),
        ("sqlite+pysqlcipher://:secret@/x", "supported are"),
        ("sqlite+aiosqlite:///x", "supported are"),
        ("mysql+pymysql://host/x", "driver that is not installed"),
        ("sqlite:///~nosuchuser/x", "not a path"),
        ("not a url://", "is not of the form postgresql://"),
    ],
)
def test_urls_that_are_none(where: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Ledger.create(where, FINGERPRINT, "tiny")


def test_importing_it_is_light() -> None:
    """Neither torch with the ledger, nor SQLAlchemy with emendo."""
    code = (
        "import sys, emendo; assert 'sqlalchemy' not in sys.modules; "
        "import emendo.ledger.place; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
