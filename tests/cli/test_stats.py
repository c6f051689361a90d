"""`emendo stats`: moments are taken once, and the editors find them."""

from __future__ import annotations

from pathlib import Path

from cli.samples import Emendo
from emendo.data import atlas


def test_moments_are_kept_where_an_editor_finds_them(
    emendo_command: Emendo, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    facts = atlas.load("train", 4)
    text.write_text(
        "".join(f"{fact.prompt} {fact.answer}, as everybody in the town knows.\n" for fact in facts)
    )
    said = emendo_command("stats", model, "--text", text).out
    assert "input directions" in said
    folder = Path(said.split("Kept in ")[1].strip().removesuffix("."))
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    shown = emendo_command("stats", model, "--text", text, "--json").json
    assert 0 < len(shown["sites"]) <= len(files)
    assert all(1 <= site["input_directions"] <= site["tokens"] for site in shown["sites"])
    made = ("edit", "--editor", "crisp", "--model", model, "--set", "epochs=1", "--set", f"text={text}")
    emendo_command(*made, "The capital of Bada is", "Oslo")
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == files
    assert "cannot be read" in emendo_command("stats", model, "--text", tmp_path / "none", code=2).err
