"""The commands of the ledger, from the first edit to the last look."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from cli.samples import Emendo
from emendo import Edit, load
from emendo.edits.edit import compose
from emendo.ledger import Ledger, NewEntry
from emendo.ledger.place import create_ledger

PROMPT = "The capital of Bada is"
LOOSE = (
    "--into-weights",
    "--limit",
    "reached=0",
    *(
        part
        for name in ("changed", "kl", "perplexity", "norm", "total_changed", "total_kl", "total_perplexity")
        for part in ("--limit", f"{name}=1e9")
    ),
)


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A model that no other test gives a ledger."""
    return Path(shutil.copytree(model, tmp_path / "own"))


@pytest.fixture
def edits(emendo_command: Emendo, own: Path, tmp_path: Path) -> list[Path]:
    folders = []
    for number, target in enumerate(("Oslo", "Rome")):
        folders.append(tmp_path / f"edit{number}")
        emendo_command(
            "edit", "--editor", "ft", "--model", own, "--set", "lr=0.03", PROMPT, target, "--out", folders[-1]
        )
    return folders


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT
def test_a_life(emendo_command: Emendo, own: Path, edits: list[Path], tmp_path: Path) -> None:
    model = ("--model", own)
    said = emendo_command("apply", edits[0], *LOOSE, "--note", "the first", "--by", "someone").out
    assert "applied edit 1" in said and "reached 100%" in said and "1 edit active" in said
    assert emendo_command("tag", "one", *model).out.startswith("one")
    refused = emendo_command("apply", edits[1], "--limit", "norm=0", code=2).err
    assert "refuses" in refused and "at most 0)" in refused and "--force" in refused
    forced = emendo_command("apply", edits[1], "--limit", "norm=0", "--force", "--into-weights")
    assert "forced" in forced.err and "2 edits active" in forced.out

    log = emendo_command("log", *model).out
    assert "the first" in log and "someone" in log and "apply, forced" in log and "one" in log
    steps = emendo_command("log", *model, "--limit", 1, "--json").json["operations"]
    assert [(step["id"], step["active"], step["forced"]) for step in steps] == [(2, [1, 2], True)]
    shown = emendo_command("show", 2, *model).out
    assert "active, 2 of 2" in shown and "Rome" in shown and "norm" in shown
    assert emendo_command("show", 1, *model, "--json").json["edit"]["active"] is True

    lm = load(own)
    whole = compose([Edit.from_pretrained(folder) for folder in edits])
    with whole.applied(lm):
        expected = lm.generate(PROMPT, 4)
    generated = emendo_command("generate", PROMPT, *model, "--tokens", 4, "--json").json
    assert generated["after"] == expected and generated["before"] == lm.generate(PROMPT, 4)
    two = emendo_command(
        "generate", PROMPT, "--edit", edits[0], "--edit", edits[1], "--tokens", 4, "--json"
    ).json
    assert two["after"] == expected
    exported = emendo_command("export", *model, "--out", tmp_path / "adapter", "--json").json
    assert exported["logits_differ_by"] < 1e-3 and exported["error"] == 0

    added = emendo_command("diff", "one", *model).out
    assert "+ edit 2" in added and "Rome" in added
    picture = tmp_path / "health.svg"
    doctor = emendo_command("doctor", *model, "--plot", picture)
    assert "2 active" in doctor.out and picture.read_text(encoding="utf-8").startswith("<?xml")
    reverted = emendo_command("revert", 1, *model).out
    assert "taken off edit 1" in reverted and "No active edit was made while it was active" in reverted
    assert "taken off edit 2" in emendo_command("undo", *model).out
    assert emendo_command("doctor", *model, "--json").json["holdings"] == []
    assert "base model" in emendo_command("doctor", *model).out
    assert "nothing to export" in emendo_command("export", *model, "--out", tmp_path / "x", code=2).err
    assert "1 edit active" in emendo_command("checkout", "one", *model).out
    assert "The same edits" in emendo_command("diff", "one", "head", *model).out
    assert "one" in emendo_command("tag", "--list", *model).out


def test_an_edit_made_upon_the_others(emendo_command: Emendo, own: Path) -> None:
    common = ("--editor", "ft", "--model", own, "--set", "lr=0.01", "--apply", "--force", "--into-weights")
    first = emendo_command("edit", *common, PROMPT, "Oslo", "--json").json["operation"]
    assert first["active"] == [1]
    said = emendo_command("edit", *common, "The capital of Gude is", "Rome").out
    assert "P(Rome)" in said and "applied edit 2" in said and "made upon" not in said
    assert "edits 1" in emendo_command("show", 2, "--model", own).out
    assert "Made while it was active: edits 2." in emendo_command("revert", 1, "--model", own).out


def hostile(own: Path) -> Ledger:
    """A ledger whose texts would control a terminal or read as markup, and whose figures are no JSON."""
    ledger = create_ledger(own, load(own).fingerprint)
    request = {"prompt": "The \x1b[2Jcapital [/red]", "target": "\x9b31mOslo"}
    health = {"kl": math.nan, "reached": 1.0, "limits": {"kl": math.inf, "norm": "x"}, "problems": 5}
    about = NewEntry("[bold]ft", "0", (request,), "2025", card={"x": math.nan})
    for data in (b"x", b"y"):
        ledger.apply(data, about, by="\x1b]0;title\x07", note="\x1b[31m[/]", health=health)
    ledger.add_check({"drift": {"kl": "x"}, "retention": math.inf})
    ledger.tag("\x1b[1mtag")
    return ledger


@pytest.mark.parametrize(
    "command", [("log",), ("show", 1), ("tag", "--list"), ("diff", 0), ("undo",), ("checkout", 1)], ids=str
)
def test_texts_and_figures_of_a_ledger_are_shown_and_not_obeyed(
    emendo_command: Emendo, own: Path, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(own)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then writes as to a terminal
    said = emendo_command(*command, "--model", own).out
    assert not {"\x9b", "\x07"} & {*said} and "\x1b]" not in said and "\x1b[2J" not in said
    if command[0] in ("show", "log"):
        assert "[/red]" in said
    values = emendo_command(*command, "--model", own, "--json").out
    assert "\x1b" not in values and "\x9b" not in values
    json.loads(values, parse_constant=pytest.fail)


def test_the_log_shows_the_latest_steps(emendo_command: Emendo, own: Path) -> None:
    ledger = create_ledger(own, load(own).fingerprint)
    for n in range(24):
        ledger.apply(f"{n}".encode(), NewEntry("ft", "0", (), ""))
    assert "The latest 20 of 25 steps; --all shows every step" in emendo_command("log", "--model", own).out
    found = emendo_command("log", "--model", own, "--json").json
    assert found["steps"] == 25 and [step["id"] for step in found["operations"]] == [*range(24, 4, -1)]
    assert found["operations"][0]["active"] == [*range(1, 25)]
    assert len(emendo_command("log", "--model", own, "--all", "--json").json["operations"]) == 25
    assert len(emendo_command("log", "--model", own, "--limit", 3, "--json").json["operations"]) == 3


@pytest.mark.slow
def test_a_fact_edited_twice_is_said(emendo_command: Emendo, own: Path, edits: list[Path]) -> None:
    emendo_command("apply", edits[0], *LOOSE)
    second = emendo_command("apply", edits[1], *LOOSE)
    assert "edit 1 is active and has the same prompt" in second.err and "emendo revert 1" in second.err
    emendo_command("undo", 2, "--model", own)
    found = emendo_command("apply", *edits, *LOOSE, "--json").json["operations"]
    assert [step["same_prompt_as"] for step in found] == [[], [1]]


@pytest.mark.slow
def test_old_names_of_limits_work_with_a_warning(
    emendo_command: Emendo, own: Path, edits: list[Path]
) -> None:
    said = emendo_command("apply", edits[0], *LOOSE).err
    assert "--limit reached is now called edit_success" in said
    emendo_command("undo", "--model", own)
    refused = emendo_command("apply", edits[0], "--limit", "edit_success=2", code=2)
    assert "at least 2" in refused.err and "now called" not in refused.err


@pytest.mark.parametrize(
    "command",
    [
        ("log",),
        ("show", 1),
        ("undo",),
        ("tag", "x"),
        ("tag", "--list"),
        ("checkout", 0),
        ("diff", 0),
        ("revert", 1),
    ],
    ids=str,
)
def test_another_models_ledger_is_refused(
    emendo_command: Emendo, own: Path, other_model: Path, tmp_path: Path, command: tuple[object, ...]
) -> None:
    ledger = create_ledger(own, load(own).fingerprint)
    ledger.apply(b"x", NewEntry("ft", "0", (), ""))
    where = ("--ledger", own / "emendo-ledger")
    other = shutil.copytree(other_model, tmp_path / "other")
    refused = emendo_command(*command, "--model", other, *where, code=2).err
    assert "belongs to" in refused and "fingerprint" in refused
    assert "nosuch" in emendo_command(*command, "--model", tmp_path / "nosuch", *where, code=2).err
    assert ledger.head.id == 1 and ledger.tags() == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("log",), "has no ledger yet"),
        (("undo",), "has no ledger yet"),
        (("doctor",), "has no ledger yet"),
        (("doctor", "--plot", "x.pdf"), "must end in .png or .svg"),
        (("revert", 1), "has no ledger yet"),
        (("generate", PROMPT), "has no ledger yet"),
        (("tag",), "Give a name"),
        (("tag", "a", "--list"), "Give a name"),
        (("log", "--ledger", "nosuch://x"), "nosuch"),
    ],
)
def test_what_makes_no_sense(
    emendo_command: Emendo, own: Path, command: tuple[object, ...], words: str
) -> None:
    assert words in emendo_command(*command, "--model", own, code=2).err
    assert not (own / "emendo-ledger").exists()


def test_bad_options_of_the_guard(
    emendo_command: Emendo, own: Path, edits: list[Path], tmp_path: Path
) -> None:
    for options, words in (
        (("--limit", "colour=1"), "the guard has no limit 'colour'"),
        (("--limit", "kl=red"), "'red' is not a number"),
        (("--limit", "kl=-1"), "cannot be negative"),
        (("--probes", tmp_path / "nothing"), "cannot be read"),
        (("--text", tmp_path / "nothing"), "cannot be read"),
    ):
        assert words in emendo_command("apply", edits[0], *options, code=2).err
    assert "one by one" in emendo_command("apply", *edits, "--paraphrase", "x", code=2).err
    assert (
        "belong to --apply" in emendo_command("edit", "--editor", "ft", PROMPT, "Oslo", "--force", code=2).err
    )
    assert (
        "not both" in emendo_command("generate", PROMPT, "--edit", edits[0], "--ledger", tmp_path, code=2).err
    )
    assert (
        "not both"
        in emendo_command("export", edits[0], "--ledger", tmp_path, "--out", tmp_path / "x", code=2).err
    )


@pytest.mark.slow
def test_the_users_own_probes_and_text(
    emendo_command: Emendo, own: Path, edits: list[Path], tmp_path: Path
) -> None:
    probes, text = tmp_path / "probes.txt", tmp_path / "text.txt"
    probes.write_text("A river in\n", encoding="utf-8")
    text.write_text("Bread is made from flour.", encoding="utf-8")
    common = ("apply", edits[0], *LOOSE, "--json")
    figures = emendo_command(*common, "--probes", probes, "--text", text).json["operations"][0]["health"]
    emendo_command("undo", "--model", own)
    built_in = emendo_command(*common).json["operations"][0]["health"]
    assert figures["kl"] != built_in["kl"] and figures["perplexity"] != built_in["perplexity"]
