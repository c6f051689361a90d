"""Where a model's ledger is, and that it has only one.

A model has a default place. A ledger that was begun elsewhere is pointed to from there, so that nobody begins a second
one by mistake: each of the two would know only a part of what was done to the model.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import make_url

from emendo.errors import StorageError
from emendo.ledger._database import FILE, Where, file_of, locate, public
from emendo.ledger.store import Ledger

POINTER = "ledger.json"


class Pointer(NamedTuple):
    """Where a ledger is: its URL without a password, and its id where that is written down."""

    url: str
    id: str | None


def ledger_of(model: str | Path) -> Path:
    """The default place of a model's ledger: a folder, there or not.

    That is ``emendo-ledger`` in the model's folder; for a model known by a name, one under ``$EMENDO_HOME``, else
    ``$XDG_DATA_HOME/emendo``, else ``~/.local/share/emendo``.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve() / "emendo-ledger"
    if own := os.environ.get("EMENDO_HOME"):
        home = Path(own).expanduser()
    else:
        home = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "emendo"
    return home.resolve() / "ledgers" / _slug(str(model))


def find_ledger(model: str | Path) -> str | None:
    """The URL of the ledger that a model has, without a password; None if it has none.

    Raises:
        StorageError: the pointer to it is damaged.
    """
    there = _there(ledger_of(model))
    return None if there is None else there.url


def create_ledger(model: str | Path, fingerprint: str, where: Where | None = None) -> Ledger:
    """Begin a model's ledger, by default at its default place; elsewhere a pointer to it is left there.

    Args:
        model: the name or folder that it is loaded by.
        fingerprint: of the model.
        where: see :meth:`Ledger.create`.

    Raises:
        StorageError: it has a ledger, or none can be written there.
    """
    home = ledger_of(model)
    where = home if where is None else where
    there, url = _there(home), public(locate(where))
    if there is not None and there.url != url:
        raise StorageError(f"{model} has a ledger already, at {there.url}. {_two(home)}")
    ledger = Ledger.create(where, fingerprint, str(model))
    _point(home, Pointer(url, ledger.id))
    return ledger


def open_ledger(model: str | Path, fingerprint: str | None = None, where: Where | None = None) -> Ledger:
    """Open a model's ledger, by default the one at its default place or pointed to from there.

    One opened elsewhere for the first time is pointed to from then on, if the fingerprint vouches for it.

    Args:
        model: the name or folder that it is loaded by.
        fingerprint: of the model; None asks nothing.
        where: see :meth:`Ledger.create`. A URL's password has to be given each time, or kept where the database's own
            tools look for it, such as ``~/.pgpass``.

    Raises:
        MismatchError: the ledger is another model's.
        StorageError: there is none, it cannot be read, or the model has another one.
    """
    home = ledger_of(model)
    there = _there(home)
    if where is None and there is None:
        raise StorageError(f"{model} has no ledger yet; its place is {home}.")
    where = where if where is not None else there.url if there is not None else home
    ledger, url = Ledger.open(where, fingerprint), public(locate(where))
    if there is None or _moved(there, url, ledger.id):
        if fingerprint is not None:
            _point(home, Pointer(url, ledger.id))
    elif there.url != url:
        raise StorageError(f"{model} has another ledger, at {there.url}, not {url}. {_two(home)}")
    elif there.id not in {None, ledger.id}:
        raise StorageError(
            f"{url} holds another ledger than the one that {home / POINTER} names. If that is meant, remove this file."
        )
    return ledger


def _there(home: Path) -> Pointer | None:
    """What stands at a default place."""
    file, pointer = home / FILE, home / POINTER
    if not pointer.is_file():
        return Pointer(public(locate(home)), None) if file.is_file() else None
    from emendo._storage import read_json  # not above: it brings torch, which nothing else here needs

    values = read_json(pointer)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in Pointer._fields):
        raise StorageError(
            f"{pointer} is damaged: it does not say where the ledger is. Remove it, and name the place."
        )
    there = Pointer(values["url"], values["id"])
    if file.is_file():
        raise StorageError(
            f"There is a ledger at {file}, but {pointer} points to another, {there.url}. {_two(home)}"
        )
    return there


def _point(home: Path, pointer: Pointer) -> None:
    """Leave word of a ledger that is elsewhere; in a place that cannot be written no second one can begin either."""
    if pointer.url == public(locate(home)):
        return
    from emendo._storage import new_file, write_json

    with suppress(StorageError), new_file(home / POINTER) as new:
        write_json(
            new, {**pointer._asdict(), "note": "Where this model's ledger is. No password is kept here."}
        )


def _moved(there: Pointer, url: str, id: str) -> bool:
    """Whether a ledger is the one pointed to, in another place: not a copy whose original is where it was."""
    file = file_of(make_url(there.url))
    return there.url != url and there.id == id and not (file is not None and file.exists())


def _two(home: Path) -> str:
    trace = home / (POINTER if (home / POINTER).exists() else FILE)
    return (
        "A model has one ledger: each of two would know only a part of what was done to it. Go on with that one, or, "
        f"to begin anew, move {trace} away."
    )


def _slug(model: str) -> str:
    """A folder's name for a model's name, another one for each."""
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", model.replace("/", "--"))
    plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII) and "--" not in model and slug.strip(".")
    if plain and len(slug) <= 80:
        return slug
    return f"{slug[:80]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
