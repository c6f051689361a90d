"""`emendo edit`, `generate`, `evaluate` and `sites` on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cli.samples import Emendo
from emendo import Edit, Editor, fuse, load
from emendo.data import read_records
from emendo.evaluate import evaluate

PROMPT = "The capital of Bada is"


def test_edit_saves_what_it_shows(emendo_command: Emendo, trained: Path, model: Path, tmp_path: Path) -> None:
    said = emendo_command(
        *("edit", "--editor", trained, PROMPT, "Oslo", "--out", tmp_path / "edit"),
        *("--paraphrase", "Bada's capital is", "--neighbour", "The capital of Gude is"),
    )
    for text in ("edited prompt", "paraphrases", "near neighbours", "unrelated", "P(Oslo)", "Bada's capital"):
        assert text in said.out
    assert f"Saved in {tmp_path / 'edit'}" in said.out
    edit = Edit.from_pretrained(tmp_path / "edit")
    assert edit.origin.requests[0].target == "Oslo"
    assert edit.card["rank"] == edit.rank
    assert [row["kind"] for row in edit.card["rows"]] == [
        *("edit", "paraphrase", "neighbour", "unrelated", "unrelated", "unrelated")
    ]
    direct = Editor.from_pretrained(trained / "editor").edit(load(model), PROMPT, "Oslo")
    for name, delta in direct.deltas.items():
        assert torch.equal(edit.deltas[name].left, delta.left)


def test_edit_without_a_place_to_save(emendo_command: Emendo, trained: Path) -> None:
    said = emendo_command("edit", "--editor", trained / "editor", PROMPT, "Oslo")
    assert "not saved" in said.err and "--out" in said.err


def test_edit_json(emendo_command: Emendo, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit"
    said = emendo_command("edit", "--editor", trained, PROMPT, "Oslo", "--out", out, "--json").json
    assert said.keys() == {
        *(
            "prompt",
            "target",
            "out",
            "chat",
            "target_before",
            "target_after",
            "reached",
            "rank",
            "relative_norm",
            "rows",
        )
    }
    assert said["out"] == str(out)
    assert said["rows"][0].keys() == {
        *("kind", "prompt", "target", "answer", "before", "after"),
        *("target_before", "target_after", "reached", "changed"),
    }
    assert said["rows"][0]["before"][0].keys() == {"text", "probability"}
    assert emendo_command("edit", "--editor", trained, PROMPT, "Oslo", "--json").json["out"] is None


def test_edit_overwrites_edits_only_when_asked(emendo_command: Emendo, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit"
    command = ("edit", "--editor", trained, PROMPT)
    emendo_command(*command, "Oslo", "--out", out)
    assert "already holds something" in emendo_command(*command, "Lima", "--out", out, code=2).err
    assert Edit.from_pretrained(out).origin.requests[0].target == "Oslo"
    emendo_command(*command, "Lima", "--out", out, "--overwrite")
    assert Edit.from_pretrained(out).origin.requests[0].target == "Lima"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    said = emendo_command(*command, "Oslo", "--out", tmp_path / "mine", "--overwrite", code=2)
    assert "not emendo's" in said.err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_generate_shows_both_sides(emendo_command: Emendo, edit_folder: Path, model: Path) -> None:
    said = emendo_command("generate", "--edit", edit_folder, PROMPT, "--tokens", 5, "--json").json
    assert said.keys() == {"prompt", "tokens", "before", "after"}
    lm, edit = load(model), Edit.from_pretrained(edit_folder)
    assert said["before"] == lm.generate(PROMPT, 5)
    with edit.applied(lm):
        assert said["after"] == lm.generate(PROMPT, 5)
    shown = emendo_command("generate", "--edit", edit_folder, PROMPT)
    assert "more than once" not in shown.err
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"without the edit  {PROMPT} ")
    assert lines[1].startswith(f"with the edit     {PROMPT} ")


def test_evaluate_json_is_the_evaluation(
    emendo_command: Emendo, trained: Path, model: Path, facts: Path
) -> None:
    said = emendo_command("evaluate", "--editor", trained, "--data", facts, "--limit", 3, "--json").json
    assert {"records", "protocol", "seconds_per_edit", "teacher_forced", "generated"} <= said.keys()
    assert said["records"] == 3
    for measure in ("teacher_forced", "generated"):
        for score in ("edit_success", "generalisation", "locality"):
            assert said[measure][score].keys() == {"mean", "low", "high"}
    direct = evaluate(load(model), Editor.from_pretrained(trained / "editor"), read_records(facts), limit=3)
    expected = json.loads(json.dumps(direct.as_dict()))
    for key in ("teacher_forced", "generated", "token_level", "locality_kl", "rank"):
        assert said[key] == expected[key], key


def test_evaluate_for_people_with_a_report(
    emendo_command: Emendo, trained: Path, facts: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    said = emendo_command(
        *("evaluate", "--editor", trained, "--data", facts, "--limit", 3, "--no-generated", "--report", page)
    )
    assert "3 facts, edited one at a time" in said.out and "teacher forced" in said.out
    assert "free generation" not in said.out
    assert str(page) in said.err
    html = page.read_text(encoding="utf-8")
    assert f"emendo evaluate --editor {trained} --data {facts} --limit 3 --no-generated" in html


def test_evaluate_without_generation_says_null(emendo_command: Emendo, trained: Path, facts: Path) -> None:
    command = ("evaluate", "--editor", trained, "--data", facts, "--limit", 2, "--no-generated", "--json")
    assert emendo_command(*command).json["generated"] is None


def test_sites_json(emendo_command: Emendo, model: Path) -> None:
    said = emendo_command("sites", model, "--last", 2, "--rank", 8, "--json").json
    assert said.keys() == {"model", "fingerprint", "sites", "editor", "memory"}
    assert said["sites"][0] == {
        "name": "model.layers.2.mlp.gate_proj",
        "d_in": 32,
        "d_out": 48,
        "block": 2,
        "attention": False,
    }
    assert len(said["sites"]) == 6
    for name in ("training", "editing"):
        parts = said["memory"][name]
        assert parts["total"] == sum(size for part, size in parts.items() if part != "total")
    lm = load(model)
    assert said["memory"]["editing"]["model"] == sum(p.numel() * 4 for p in lm.model.parameters())
    assert said["memory"]["training"]["editor"] == 20 * said["editor"]["parameters"]


def test_sites_agrees_with_the_editor_that_is_trained(
    emendo_command: Emendo, model: Path, trained: Path
) -> None:
    said = emendo_command("sites", model, "--last", 2, "--rank", 8, "--json").json
    editor = Editor.from_pretrained(trained / "editor")
    assert said["editor"]["parameters"] == sum(p.numel() for p in editor.parameters())
    assert [site["name"] for site in said["sites"]] == [site.name for site in editor.sites]
    assert said["fingerprint"] == editor.fingerprint


def test_sites_for_people(emendo_command: Emendo, model: Path) -> None:
    said = emendo_command("sites", model, "--sites", "attention", "--last", 1).out
    assert "model.layers.3.self_attn.q_proj" in said and "attention" in said
    assert "4 weight matrices" in said and "estimate" in said


@pytest.mark.parametrize("flag", [["--dtype", "bfloat16"], ["--device", "cpu"]])
def test_number_format_and_device(emendo_command: Emendo, edit_folder: Path, flag: list[str]) -> None:
    assert "with the edit" in emendo_command("generate", "--edit", edit_folder, PROMPT, *flag).out


# -------------------------------------------------------------------------------------------- fuse


@pytest.mark.slow
def test_fuse_puts_edits_into_one(
    emendo_command: Emendo, trained: Path, model: Path, edit_folder: Path, tmp_path: Path
) -> None:
    other, out = tmp_path / "other", tmp_path / "fused"
    emendo_command("edit", "--editor", trained, "The capital of Gude is", "Lima", "--out", other)
    said = emendo_command("fuse", edit_folder, other, "--out", out, "--keep", "5")
    assert f"Fused 2 edits into one of rank {Edit.from_pretrained(out).rank}, saved in {out}." in said.out
    assert "of 2 facts have their new answer" in said.out
    parts = [Edit.from_pretrained(folder) for folder in (edit_folder, other)]
    expected = fuse(load(model), parts, keep=5.0)
    for name, delta in Edit.from_pretrained(out).deltas.items():
        torch.testing.assert_close(delta.left, expected.deltas[name].left)
    assert "Warning" not in said.err
    again = emendo_command("fuse", edit_folder, other, "--out", out, "--overwrite", "--json").json
    assert again["facts"] == 2 and 0 <= again["reached"] <= 2 and 0 <= again["added_up"] <= 2


@pytest.fixture(scope="module")
def contradicting(emendo_command: Emendo, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit of the same fact as the other one, written in another way."""
    out = tmp_path_factory.mktemp("edits") / "other"
    make = ("edit", "--editor", "ft", "--set", "steps=1", "--model", model)
    emendo_command(*make, "the  capital of BADA is ", "Rome", "--out", out)
    return out


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--edit", "EDIT", "--edit", "OTHER", PROMPT),
        ("generate", "--edit", "EDIT", "--edit", "OTHER", PROMPT, "--json"),
        ("fuse", "EDIT", "OTHER", "--out", "OUT"),
        ("export", "--model", "MODEL", "--to", "merged", "--out", "OUT"),
    ],
    ids=lambda command: command[0],
)
def test_edits_of_one_fact_are_said_once(
    emendo_command: Emendo,
    command: tuple[str, ...],
    model: Path,
    edit_folder: Path,
    contradicting: Path,
    tmp_path: Path,
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    if command[0] == "export":
        emendo_command(
            "apply", edit_folder, contradicting, "--model", own, "--force", "--into-weights", "--json"
        )
    places = {"EDIT": edit_folder, "OTHER": contradicting, "OUT": tmp_path / "out", "MODEL": own}
    words = [places.get(word, word) for word in command]
    said = emendo_command(*words)
    assert said.err.count("edited more than once") == 1
    assert "1 prompt(s) edited more than once: 'The capital of Bada is' to 'Oslo', 'Rome'." in said.err


def test_fuse_keeps_the_text_of_a_file(emendo_command: Emendo, edit_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The river is far from the town, and nobody there has ever seen the sea.\n" * 4)
    said = emendo_command("fuse", edit_folder, "--out", tmp_path / "a", "--text", text, "--json").json
    plain = emendo_command("fuse", edit_folder, "--out", tmp_path / "b", "--json").json
    assert said["facts"] == plain["facts"] == 1
    found = [Edit.from_pretrained(tmp_path / name) for name in "ab"]
    assert found[0].digest != found[1].digest


def test_fuse_edits_the_facts_of_a_file(
    emendo_command: Emendo, trained: Path, model: Path, facts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fused"
    said = emendo_command(
        "fuse", "--editor", trained, "--data", facts, "--limit", "3", "--out", out, "--json"
    ).json
    assert said["facts"] == 3
    lm, editor = load(model), Editor.from_pretrained(trained / "editor")
    told = read_records(facts, limit=3).records
    parts = [editor.edit(lm, record.prompt, record.target) for record in told]
    expected = fuse(lm, parts, paraphrases=[record.paraphrases for record in told])
    found = Edit.from_pretrained(out)
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(found.deltas[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "Give edits"),
        (["--data", "atlas"], "--data needs an --editor"),
        (["--data", "atlas", "--editor", "cache"], "changes no weights"),
    ],
)
def test_fuse_says_what_it_needs(
    emendo_command: Emendo, model: Path, tmp_path: Path, options: list[str], why: str
) -> None:
    limit = ["--limit", "2"] if "--editor" in options else []
    said = emendo_command("fuse", *options, *limit, "--model", model, "--out", tmp_path / "fused", code=2)
    assert why in said.err
    assert not (tmp_path / "fused").exists()
