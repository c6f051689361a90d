"""Where a model's ledger is, and that there is only one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emendo.errors import MismatchError, StorageError
from emendo.ledger import Ledger, place
from emendo.ledger.place import Pointer, create_ledger, default_folder, find_ledger, open_ledger
from ledger.samples import FINGERPRINT, filled


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own."""
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "ledgers"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that could be a model's."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/ledger.sqlite"


def test_the_default_place(model: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder(model) == default_folder(str(model)) == model / "emendo-ledger"
    (tmp_path / "link").symlink_to(model)
    assert default_folder(tmp_path / "link") == model / "emendo-ledger"
    monkeypatch.chdir(tmp_path)
    assert default_folder("model") == model / "emendo-ledger"

    assert default_folder("smollm2-135m") == home / "smollm2-135m"
    monkeypatch.delenv("EMENDO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert default_folder("org/name") == tmp_path / "xdg" / "emendo" / "ledgers" / "org--name"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder("org/name") == tmp_path / ".local" / "share" / "emendo" / "ledgers" / "org--name"


def test_names_do_not_meet(home: Path) -> None:
    names = [
        "a/b",
        "a--b",
        "a-b",
        "a b",
        "a/b/c",
        "a/b--c",
        "/a/b",
        "..",
        "../..",
        "a:b",
        "ä",
        "x" * 250,
        "x" * 251,
    ]
    places = [default_folder(name) for name in names]
    assert len(set(places)) == len(names)
    for place_ in places:
        assert place_.parent == home and place_.name not in {".", ".."} and len(place_.name) < 100


def test_begun_and_opened_by_default(model: Path) -> None:
    assert find_ledger(model) is None
    with pytest.raises(StorageError, match="has no ledger yet; its place is"):
        open_ledger(model)
    filled(create_ledger(model, FINGERPRINT), 1)
    assert [file.name for file in (model / "emendo-ledger").iterdir()] == ["ledger.sqlite"]
    assert open_ledger(model, FINGERPRINT).head.id == 1
    assert open_ledger(model, FINGERPRINT, model / "emendo-ledger").head.id == 1
    assert find_ledger(model) == url(model / "emendo-ledger")
    with pytest.raises(StorageError, match="already"):
        create_ledger(model, FINGERPRINT)
    with pytest.raises(MismatchError):
        open_ledger(model, "beef")
    shutil.move(model, model.with_name("moved"))  # the ledger goes with its model
    assert open_ledger(model.with_name("moved"), FINGERPRINT).head.id == 1


def test_begun_elsewhere(model: Path, tmp_path: Path) -> None:
    ledger = create_ledger(model, FINGERPRINT, tmp_path / "else")
    written = json.loads((model / "emendo-ledger" / "ledger.json").read_text())
    assert (written["url"], written["id"]) == (url(tmp_path / "else"), ledger.id)
    assert find_ledger(model) == written["url"]
    assert open_ledger(model, FINGERPRINT).id == open_ledger(model, None, tmp_path / "else").id == ledger.id


def test_no_second_one(model: Path, tmp_path: Path) -> None:
    """Wherever the first is, and whatever the second is."""
    Ledger.create(tmp_path / "third", FINGERPRINT, "m")
    for first in (None, tmp_path / "else"):
        create_ledger(model, FINGERPRINT, first)
        trace = "ledger.sqlite" if first is None else "ledger.json"
        others = [tmp_path / "second", tmp_path / "third"] + ([model / "emendo-ledger"] if first else [])
        for other in others:
            with pytest.raises(
                StorageError, match=rf"has a ledger already, at .*begin anew, move .*{trace} away"
            ):
                create_ledger(model, FINGERPRINT, other)
        with pytest.raises(StorageError, match=rf"has another ledger, at .*begin anew, move .*{trace} away"):
            open_ledger(model, FINGERPRINT, tmp_path / "third")
        assert not (tmp_path / "second").exists()
        (model / "emendo-ledger" / trace).unlink()  # as the message says
    create_ledger(model, FINGERPRINT, tmp_path / "second")


def test_a_copy_is_a_second_one(model: Path, tmp_path: Path) -> None:
    for first in (None, tmp_path / "else"):
        ledger = create_ledger(model, FINGERPRINT, first)
        shutil.copytree(Path(ledger.where).parent, tmp_path / "copy")
        with pytest.raises(StorageError, match="has another ledger"):
            open_ledger(model, FINGERPRINT, tmp_path / "copy")
        shutil.rmtree(model / "emendo-ledger")
        shutil.rmtree(tmp_path / "copy")


def test_a_ledger_that_was_moved_is_still_the_one(model: Path, tmp_path: Path) -> None:
    ledger = create_ledger(model, FINGERPRINT, tmp_path / "else")
    (tmp_path / "else").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match="There is no ledger at"):
        open_ledger(model, FINGERPRINT)
    assert open_ledger(model, FINGERPRINT, tmp_path / "moved").id == ledger.id
    assert open_ledger(model, FINGERPRINT).id == ledger.id


def test_a_first_opening_elsewhere_is_remembered(model: Path, tmp_path: Path) -> None:
    """As after a create that was killed before it left its pointer."""
    Ledger.create(tmp_path / "else", FINGERPRINT, "m")
    open_ledger(model, None, tmp_path / "else")
    assert find_ledger(model) is None  # nobody vouched for it
    with pytest.raises(MismatchError):
        open_ledger(model, "beef", tmp_path / "else")
    assert find_ledger(model) is None
    open_ledger(model, FINGERPRINT, tmp_path / "else")
    assert find_ledger(model) == url(tmp_path / "else")


def test_another_one_in_its_place(model: Path, tmp_path: Path) -> None:
    create_ledger(model, FINGERPRINT, tmp_path / "else")
    shutil.rmtree(tmp_path / "else")
    Ledger.create(tmp_path / "else", FINGERPRINT, "m")
    with pytest.raises(StorageError, match=r"holds another ledger than the one that .*ledger\.json names"):
        open_ledger(model, FINGERPRINT)


def test_a_file_beside_a_pointer(model: Path, tmp_path: Path) -> None:
    create_ledger(model, FINGERPRINT, tmp_path / "else")
    Ledger.create(model / "emendo-ledger", FINGERPRINT, "m")
    for use in (find_ledger, open_ledger):
        with pytest.raises(StorageError, match="points to another"):
            use(model)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": 3, "id": "x"}', '{"url": "sqlite:///x"}'])
def test_a_damaged_pointer(model: Path, content: str) -> None:
    (model / "emendo-ledger").mkdir()
    (model / "emendo-ledger" / "ledger.json").write_text(content)
    with pytest.raises(StorageError, match="damaged"):
        open_ledger(model)


def test_passwords_are_not_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place._remember(
        model / "emendo-ledger",
        Pointer(
            place.public(
                place.locate("postgresql://ada:s3cret@host:5/db?sslpassword=s3cret&sslmode=require")
            ),
            "x",
        ),
    )
    text = (model / "emendo-ledger" / "ledger.json").read_text()
    assert "s3cret" not in text and "***" not in text
    assert json.loads(text)["url"] == "postgresql+psycopg://ada@host:5/db?sslmode=require"
    assert "password" in json.loads(text)["note"]


@pytest.mark.parametrize(
    "there",
    [
        "postgresql+psycopg://ada@203.0.113.1/db",
        "mysql://ada@203.0.113.1/db",
        "sqlite:////etc/x/ledger.sqlite",
    ],
)
def test_a_pointer_in_a_model_folder_leads_nowhere_by_itself(
    model: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in that folder, in the user's own data folder, or where the user was before."""
    (model / "emendo-ledger").mkdir()
    (model / "emendo-ledger" / "ledger.json").write_text(json.dumps({"url": there, "id": "x"}))
    opened: list[object] = []
    monkeypatch.setattr(Ledger, "open", lambda *given: opened.append(given))
    with pytest.raises(StorageError, match=r"ledger\.json names a ledger at .*name it once: --ledger"):
        open_ledger(model, FINGERPRINT)
    assert opened == []


def test_a_pointer_is_followed_once_the_user_has_named_its_ledger(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = create_ledger(model, FINGERPRINT, tmp_path / "else")
    assert open_ledger(model).id == ledger.id  # this user created it there
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path / "somebody else"))
    with pytest.raises(StorageError, match="have not used so far"):
        open_ledger(model)
    assert open_ledger(model, where=tmp_path / "else").id == ledger.id
    assert open_ledger(model).id == ledger.id


def test_a_pointer_inside_its_model_folder_is_followed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = create_ledger(model, FINGERPRINT, model / "edits")
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path / "somebody else"))
    assert open_ledger(model).id == ledger.id


def test_a_named_ledger_has_to_be_the_models(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    create_ledger(other, FINGERPRINT)
    asked: list[str] = []

    def fingerprint(found: str) -> Callable[[], str]:
        return lambda: asked.append(found) or found

    with pytest.raises(MismatchError, match=r"belongs to .*other.* but .*model' has fingerprint beef"):
        open_ledger(model, fingerprint("beef"), other / "emendo-ledger")
    assert find_ledger(model) is None
    for _ in range(2):  # the same weights in another folder: compared once, then pointed to
        open_ledger(model, fingerprint(FINGERPRINT), other / "emendo-ledger")
    assert asked == ["beef", FINGERPRINT]
    open_ledger(other, fingerprint("beef"), other / "emendo-ledger")  # its own
    assert asked == ["beef", FINGERPRINT]


@pytest.mark.parametrize("name", ["x" * 5000, "~nosuchuser/x", "a\0b", "\udcff"])
def test_a_model_of_an_odd_name_has_no_ledger(name: str) -> None:
    with pytest.raises(StorageError, match="no ledger yet"):
        open_ledger(name)


def test_a_place_that_cannot_be_written_needs_no_pointer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "emendo-ledger").touch()  # where a folder would have to be
    ledger = create_ledger(model, FINGERPRINT, tmp_path / "else")
    assert open_ledger(model, FINGERPRINT, tmp_path / "else").id == ledger.id
    with pytest.raises(StorageError, match="Name another place"):
        create_ledger(model, FINGERPRINT)
