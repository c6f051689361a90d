"""The commands of the ledger, from the first edit to the last look."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cli.samples import Emendo
from emendo import Edit, load
from emendo.edits.edit import compose

PROMPT = "The capital of Bada is"
LOOSE = (
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
    forced = emendo_command("apply", edits[1], "--limit", "norm=0", "--force")
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
    common = ("--editor", "ft", "--model", own, "--set", "lr=0.01", "--apply", "--force")
    first = emendo_command("edit", *common, PROMPT, "Oslo", "--json").json["operation"]
    assert first["active"] == [1]
    said = emendo_command("edit", *common, "The capital of Gude is", "Rome").out
    assert "P(Rome)" in said and "applied edit 2" in said and "made upon" not in said
    assert "edits 1" in emendo_command("show", 2, "--model", own).out
    assert "Made while it was active: edits 2." in emendo_command("revert", 1, "--model", own).out


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
