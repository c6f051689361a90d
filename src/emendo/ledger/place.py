"""The place of a model's ledger, and the rule that a model has only one.

Every model has a default place. If its ledger is elsewhere, a pointer file at the default place says where, so that
nobody creates a second ledger by mistake: each of the two would know only a part of the model's edits.

A model folder may come from anybody, so its pointer is followed only to a file in that folder or in the user's own data
folder, or to a ledger that the user has named before. It never makes emendo connect to a server by itself.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sqlalchemy import make_url

from emendo._storage import new_file, read_json, write_json
from emendo.errors import MismatchError, StorageError
from emendo.ledger._database import FILE, Where, file_of, locate, public
from emendo.ledger.store import Ledger

POINTER = "ledger.json"
_KNOWN = "known-ledgers"

Fingerprint: TypeAlias = str | Callable[[], str] | None
"""The fingerprint of a model; a function that finds it out when it is needed; or None to skip the comparison."""


class Pointer(NamedTuple):
    """The location of a ledger: its URL without a password, and its id if that is stored."""

    url: str
    id: str | None


def default_folder(model: str | Path) -> Path:
    """The default place of a model's ledger: a folder, which need not exist.

    That is ``emendo-ledger`` in the model's folder, or for a model known by a name a folder in the user's data folder:
    ``$EMENDO_HOME``, else ``$XDG_DATA_HOME/emendo``, else ``~/.local/share/emendo``.
    """
    folder = _model_folder(model)
    return _data_folder() / "ledgers" / _slug(str(model)) if folder is None else folder / "emendo-ledger"


def find_ledger(model: str | Path) -> str | None:
    """The URL of a model's ledger, without a password; None if it has none.

    Raises:
        StorageError: its pointer file is damaged.
    """
    recorded = _recorded(default_folder(model))
    return None if recorded is None else recorded.url


def create_ledger(model: str | Path, fingerprint: str, where: Where | None = None) -> Ledger:
    """Create the ledger of a model, by default at its default place; elsewhere a pointer to it is left there.

    Args:
        model: the name or folder that it is loaded from.
        fingerprint: fingerprint of the model.
        where: see :meth:`Ledger.create`.

    Raises:
        RequestError: ``where`` is not a URL of a supported database.
        StorageError: the model has a ledger, or none can be written there.
    """
    home = default_folder(model)
    where = home if where is None else where
    recorded, url = _recorded(home), public(locate(where))
    if recorded is not None and recorded.url != url:
        raise StorageError(f"{model} has a ledger already, at {recorded.url}. {_one_only(home)}")
    ledger = Ledger.create(where, fingerprint, str(_model_folder(model) or model))
    _remember(home, Pointer(url, ledger.id))
    return ledger


def open_ledger(model: str | Path, fingerprint: Fingerprint = None, where: Where | None = None) -> Ledger:
    """Open the ledger of a model, by default the one at its default place or the one that the pointer there names.

    A ledger that is named for the first time is compared with the model, by their names or fingerprints. From then on a
    pointer names it.

    Args:
        model: the name or folder that it is loaded from.
        fingerprint: see :data:`Fingerprint`.
        where: see :meth:`Ledger.create`. A URL's password has to be given each time, or kept where the database's own
            tools look for it, such as ``~/.pgpass``.

    Raises:
        MismatchError: the ledger belongs to another model.
        RequestError: ``where`` is not a URL of a supported database.
        StorageError: there is none, it cannot be read, the model has another one, or a model folder names one that the
            user never named.
    """
    home = default_folder(model)
    recorded, named = _recorded(home), where is not None
    if where is None:
        if recorded is None:
            raise StorageError(f"{model} has no ledger yet; its place is {home}.")
        if not _is_trusted(home, recorded):
            raise StorageError(
                f"{home / POINTER} names a ledger at {recorded.url}, outside the model's folder, that you have not "
                "used so far. A model folder may come from anybody, so this is not followed by itself. If the ledger "
                f"is yours, name it once: --ledger {recorded.url}"
            )
        where = recorded.url
    ledger = Ledger.open(where, fingerprint if isinstance(fingerprint, str) else None)
    pointer = Pointer(public(locate(where)), ledger.id)
    if recorded is None:
        if not _is_vouched_for(ledger, model, fingerprint):
            return ledger
    elif _moved(recorded, pointer):
        if fingerprint is None:
            return ledger
    elif recorded.url != pointer.url:
        raise StorageError(
            f"{model} has another ledger, at {recorded.url}, not {pointer.url}. {_one_only(home)}"
        )
    elif recorded.id not in {None, ledger.id}:
        raise StorageError(
            f"{pointer.url} holds another ledger than the one that {home / POINTER} names. If that is intended, remove "
            "this file."
        )
    if named:
        _remember(home, pointer)
    return ledger


def _is_vouched_for(ledger: Ledger, model: str | Path, fingerprint: Fingerprint) -> bool:
    """Whether a ledger is known to belong to the model; False where nothing is to be compared.

    Raises:
        MismatchError: it belongs to another model.
    """
    if fingerprint is None or isinstance(fingerprint, str):
        return fingerprint is not None
    if ledger.model == str(_model_folder(model) or model):
        return True
    if not ledger.belongs_to(found := fingerprint()):
        raise MismatchError(
            f"The ledger at {ledger.where} belongs to {ledger.model!r} with fingerprint {ledger.fingerprint}, but "
            f"{str(model)!r} has fingerprint {found}. Give the model of this ledger, or the ledger of this model."
        )
    return True


def _recorded(home: Path) -> Pointer | None:
    """The ledger at a default place, or the one that the pointer there names."""
    file, pointer = home / FILE, home / POINTER
    if not _is_file(pointer):
        return Pointer(public(locate(home)), None) if _is_file(file) else None
    values = read_json(pointer)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in Pointer._fields):
        raise StorageError(
            f"{pointer} is damaged: it does not name a ledger. Remove it, and give the place with --ledger."
        )
    recorded = Pointer(values["url"], values["id"])
    if _is_file(file):
        raise StorageError(
            f"There is a ledger at {file}, but {pointer} points to another, {recorded.url}. {_one_only(home)}"
        )
    return recorded


def _is_trusted(home: Path, pointer: Pointer) -> bool:
    """Whether a pointer may be followed without the user naming the ledger."""
    if home.is_relative_to(_data_folder()) or _is_file(_known_file(pointer)):
        return True
    file = file_of(locate(pointer.url))
    return file is not None and any(
        file.resolve().is_relative_to(folder) for folder in (home.parent, _data_folder())
    )


def _remember(home: Path, pointer: Pointer) -> None:
    """Point to a ledger that is elsewhere, and record that the user named it.

    Where that cannot be written nobody can create a second ledger either.
    """
    if pointer.url == public(locate(home)):
        return
    with suppress(StorageError):
        if _recorded(home) != pointer:
            with new_file(home / POINTER) as new:
                note = "The place of this model's ledger. No password is stored here."
                write_json(new, {**pointer._asdict(), "note": note})
    with suppress(StorageError):
        if not _is_file(_known_file(pointer)):
            with new_file(_known_file(pointer)) as new:
                write_json(new, pointer._asdict())


def _known_file(pointer: Pointer) -> Path:
    """The file that says that the user named a ledger; its name needs the ledger's id, which is random."""
    key = hashlib.sha256(f"{pointer.url} {pointer.id}".encode()).hexdigest()
    return _data_folder() / _KNOWN / f"{key[:32]}.json"


def _moved(recorded: Pointer, pointer: Pointer) -> bool:
    """Whether a ledger is the recorded one in another place: not a copy whose original is still where it was."""
    if recorded.url == pointer.url or recorded.id != pointer.id:
        return False
    file = file_of(make_url(recorded.url))
    return file is None or not file.exists()


def _one_only(home: Path) -> str:
    trace = home / (POINTER if (home / POINTER).exists() else FILE)
    return (
        "A model has one ledger: each of two would know only a part of its edits. Use that one, or, to begin anew, "
        f"move {trace} away."
    )


def _model_folder(model: str | Path) -> Path | None:
    """The absolute folder of a model; None for a model known by a name."""
    try:
        folder = Path(model).expanduser()
        return folder.resolve() if (folder / "config.json").is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a zero byte
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be read
        return False


def _data_folder() -> Path:
    if own := os.environ.get("EMENDO_HOME"):
        return Path(own).expanduser().resolve()
    return (Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "emendo").resolve()


def _slug(model: str) -> str:
    """A folder name for a model's name; different names have different ones."""
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", model.replace("/", "--"))
    plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII) and "--" not in model and slug.strip(".")
    if plain and len(slug) <= 80:
        return slug
    return f"{slug[:80]}-{hashlib.sha256(model.encode(errors='surrogatepass')).hexdigest()[:8]}"
