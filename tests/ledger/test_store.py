"""The ledger's steps and questions."""

from __future__ import annotations

import getpass
import hashlib
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from emendo.errors import ConflictError, RequestError
from emendo.ledger import Entry, Ledger
from emendo.ledger import _database as database
from emendo.ledger import _queries as queries
from ledger.samples import FINGERPRINT, about, ask, consistent, filled, payload


def ids(entries: tuple[Entry, ...]) -> list[int]:
    return [entry.id for entry in entries]


def test_a_new_ledger(ledger: Ledger, tmp_path: Path) -> None:
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.sqlite"]
    assert (ledger.fingerprint, ledger.model) == (FINGERPRINT, "tiny")
    assert ledger.active == () and ledger.entries() == () and ledger.tags() == [] and ledger.checks() == []
    head = ledger.head
    assert (head.id, head.parent, head.kind, head.active) == (0, None, "begin", ())
    again = Ledger.open(tmp_path, FINGERPRINT)
    assert (again.id, again.created, again.where) == (
        ledger.id,
        ledger.created,
        str(tmp_path / "ledger.sqlite"),
    )


def test_apply_keeps_the_bytes_and_what_is_known(ledger: Ledger) -> None:
    data = b"\x00\xff" * 1000
    step = ledger.apply(
        data,
        about(),
        parent=0,
        health={"kl": math.inf, "lost": None},
        forced=True,
        by="ada",
        note="as asked\nby mail",
    )
    assert step == ledger.head == ledger.log()[0]
    assert (step.id, step.parent, step.kind, step.edits, step.active) == (1, 0, "apply", (1,), (1,))
    assert (step.forced, step.by, step.note) == (True, "ada", "as asked\nby mail")
    assert step.health == {"kl": math.inf, "lost": None}
    (entry,) = ledger.active
    assert entry == ledger.entry(1) == ledger.entries()[0]
    digest = hashlib.sha256(data).hexdigest()
    assert (entry.digest, entry.bytes, ledger.load(1)) == (digest, 2000, data)
    told = about()
    for name in ("editor", "version", "requests", "made", "upon", "rank", "card"):
        assert getattr(entry, name) == getattr(told, name), name


def test_undo_takes_the_last_off(ledger: Ledger) -> None:
    filled(ledger, 4)
    assert ledger.undo().active == (1, 2, 3)
    step = ledger.undo(2, note="too many")
    assert (step.kind, step.edits, step.active, step.note) == ("undo", (2, 3), (1,), "too many")
    consistent(ledger)


def test_revert_takes_any_off(ledger: Ledger) -> None:
    filled(ledger, 4)
    step = ledger.revert(2)
    assert (step.kind, step.edits, step.active) == ("revert", (2,), (1, 3, 4))
    assert ids(ledger.entries()) == [1, 2, 3, 4]  # nothing is forgotten
    consistent(ledger)


def test_an_edit_put_on_again_keeps_its_number(ledger: Ledger) -> None:
    filled(ledger, 2)
    ledger.undo(2)
    assert ledger.apply(payload(2), about("told otherwise")).active == (2,)
    assert ledger.entry(2).requests[0]["prompt"] == "prompt 2"
    assert len(ledger.entries()) == 2


def test_later_upon_names_those_computed_in_its_presence(ledger: Ledger) -> None:
    filled(ledger, 2)
    first, second = (entry.digest for entry in ledger.active)
    ledger.apply(payload(3), about(upon=(first, second)))
    ledger.apply(payload(4), about(upon=(second,)))
    ledger.apply(payload(5), about(upon=(first,)))
    assert ids(ledger.later_upon(1)) == [3, 5]
    assert ids(ledger.later_upon(4)) == []
    ledger.revert(1)
    ledger.undo()
    assert ids(ledger.later_upon(1)) == [3]  # also when it is off, and only those that are not


def test_tags_checkout_and_diff(ledger: Ledger) -> None:
    filled(ledger, 3)
    tag = ledger.tag("good", by="ada")
    assert (tag.name, tag.operation, tag.by) == ("good", 3, "ada")
    ledger.revert(2)
    ledger.apply(payload(4), about())
    ledger.tag("early", 1)
    assert [tag.name for tag in ledger.tags()] == ["early", "good"]

    added, removed = ledger.diff("good", "head")
    assert (ids(added), ids(removed)) == ([4], [2])
    added, removed = ledger.diff(0, "3")
    assert (ids(added), ids(removed)) == ([1, 2, 3], [])

    step = ledger.checkout("good")
    assert (step.id, step.kind, step.active, step.edits) == (6, "checkout", (1, 2, 3), (2, 4))
    assert ledger.checkout(0).active == ()
    assert ledger.checkout("5").active == (1, 3, 4)
    assert ledger.operation("early").id == 1
    consistent(ledger)


def test_the_log_is_the_latest_first(ledger: Ledger) -> None:
    filled(ledger, 3)
    assert [step.id for step in ledger.log()] == [3, 2, 1, 0]
    assert [step.id for step in ledger.log(2)] == [3, 2]


def test_checks_belong_to_an_operation(ledger: Ledger) -> None:
    filled(ledger, 2)
    first = ledger.add_check({"held": 2, "perplexity": 1.5})
    ledger.add_check({"held": 1}, operation=1)
    assert first.operation == 2 and first == ledger.checks()[0]
    assert [(check.id, check.operation, check.figures["held"]) for check in ledger.checks()] == [
        (1, 2, 2),
        (2, 1, 1),
    ]


def test_who_did_it(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.apply(payload(1), about()).by == getpass.getuser()

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert ledger.undo().by == "unknown"


# -------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Edits 1 and 2 active, 3 taken off by operation 4, operation 3 tagged."""
    ledger = filled(Ledger.create(tmp_path_factory.mktemp("used"), FINGERPRINT, "tiny"), 3)
    ledger.tag("v1")
    ledger.undo()
    return ledger


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda ledger: ledger.undo(3), "3 edits cannot be taken off: the number of active ones is 2"),
        (lambda ledger: ledger.undo(0), "from 1"),
        (lambda ledger: ledger.revert(9), "There is no edit 9; the last is 3"),
        (lambda ledger: ledger.revert(3), r"Edit 3 is not active: operation 4 \(undo\) took it off"),
        (lambda ledger: ledger.apply(payload(1), about()), "active already: it is edit 1"),
        (lambda ledger: ledger.checkout("nope"), "There is no tag 'nope'; the tags are: v1"),
        (lambda ledger: ledger.checkout(17), "There is no operation 17; the latest is 4"),
        (lambda ledger: ledger.checkout(-1), "There is no operation -1"),
        (lambda ledger: ledger.diff("v1", "²"), "There is no tag '²'"),
        (lambda ledger: ledger.entry(0), "There is no edit 0"),
        (lambda ledger: ledger.load(9), "There is no edit 9"),
        (lambda ledger: ledger.later_upon(9), "There is no edit 9"),
        (lambda ledger: ledger.tag("v1"), "names operation 3 already"),
        (lambda ledger: ledger.tag("v2", 17), "There is no operation 17"),
        (lambda ledger: ledger.tag("12"), "cannot be a tag"),
        (lambda ledger: ledger.tag("head"), "cannot be a tag"),
        (lambda ledger: ledger.tag(" "), "cannot be a tag"),
        (lambda ledger: ledger.tag("x" * 201), "cannot be a tag"),
        (lambda ledger: ledger.add_check({}, operation=17), "There is no operation 17"),
        (lambda ledger: ledger.undo(note="a\0b"), "zero byte"),
        (lambda ledger: ledger.undo(by="\udcff"), "UTF-8"),
    ],
)
def test_what_cannot_be_done_changes_nothing(used: Ledger, do: Any, words: str) -> None:
    ledger = used
    before = ledger.log(), ledger.entries(), ledger.tags(), ledger.checks()
    with pytest.raises(RequestError, match=words):
        do(ledger)
    assert (ledger.log(), ledger.entries(), ledger.tags(), ledger.checks()) == before


def test_undo_of_nothing(ledger: Ledger) -> None:
    with pytest.raises(RequestError, match="nothing to take off"):
        ledger.undo()


def test_a_step_decided_upon_an_older_state(ledger: Ledger) -> None:
    seen = ledger.head.id
    filled(ledger, 1)
    for step in (
        lambda: ledger.apply(payload(2), about(), parent=seen),
        lambda: ledger.undo(parent=seen),
        lambda: ledger.revert(1, parent=seen),
        lambda: ledger.checkout(0, parent=seen),
    ):
        with pytest.raises(ConflictError, match="operation 0, but the latest is operation 1"):
            step()
    assert ledger.head.id == 1 and len(ledger.entries()) == 1
    assert ledger.undo(parent=1).id == 2


def test_a_faster_process_makes_the_step_be_done_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database does not lock, the keys tell; here the head is read once as it was before."""
    filled(ledger, 2)
    stale, real, reads = ledger.log()[1], queries.head, []

    def head(connection: Any) -> Any:
        reads.append(1)
        return stale if len(reads) == 1 else real(connection)

    monkeypatch.setattr(queries, "head", head)
    assert ledger.apply(payload(3), about()).active == (1, 2, 3)
    assert len(reads) == 2
    monkeypatch.setattr(queries, "head", lambda _: stale)
    monkeypatch.setattr(database, "_ATTEMPTS", 3)
    with pytest.raises(ConflictError, match="faster"):
        ledger.apply(payload(4), about())
    monkeypatch.setattr(queries, "head", real)
    consistent(ledger)


def test_one_parent_has_one_child(ledger: Ledger, tmp_path: Path) -> None:
    filled(ledger, 1)
    row = "2, 0, 'undo', '[]', '', '', '', 0, NULL, 0"
    with pytest.raises(sqlite3.IntegrityError, match=r"operations.parent"):
        ask(tmp_path / "ledger.sqlite", f"INSERT INTO operations VALUES ({row})")
