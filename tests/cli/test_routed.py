"""`emendo evaluate --routed` on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cli.samples import Emendo


def test_the_command_prints_the_routing_and_keeps_it(
    emendo_command: Emendo, model: Path, facts: Path, tmp_path: Path
) -> None:
    asked = (
        "--editor",
        "ft",
        "--model",
        model,
        "--set",
        "steps=2",
        "--data",
        facts,
        "--limit",
        3,
        "--routed",
    )
    out = tmp_path / "routed"
    found = emendo_command("evaluate", *asked, "--no-generated", "--out", out, "--json").json
    assert {"right", "wrong", "none", "false_fires"} <= found["routing"].keys()
    assert emendo_command("evaluate", "show", out, "--json").json["routing"] == found["routing"]
    assert "the right edit" in (out / "summary.md").read_text(encoding="utf-8")
    assert "in scope: the right edit" in emendo_command("evaluate", *asked, "--no-generated").out
    said = emendo_command("evaluate", *asked, "--sequential", code=2).err
    assert "--routed keeps each edit by itself" in said


def test_edits_in_the_memory_of_a_ledger(emendo_command: Emendo, model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    common = ("--editor", "ft", "--model", own, "--set", "lr=0.03", "--apply", "--force")
    emendo_command("edit", *common, "The capital of Bada is", "Oslo")
    said = emendo_command("edit", *common, "The river in Gude is called", "Rome", "--alias", "Old Gude").out
    assert "2 edits active" in said
    why = emendo_command("why", "The capital of Bada is", "--model", own)
    assert "answered by edit 1" in why.out and "→ Oslo" in why.out
    assert (
        emendo_command("why", "The river in Old Gude is called", "--model", own, "--json").json["edit"] == 2
    )
    assert "the base model does" in emendo_command("why", "Two and two are", "--model", own).out
    found = emendo_command("generate", "Two and two are", "--model", own, "--json").json
    assert found["before"] == found["after"]
    found = emendo_command("generate", "The capital of Bada is", "--model", own, "--tokens", 2, "--json").json
    assert "Oslo" in found["after"] and "Oslo" not in found["before"]
    emendo_command("revert", 1, "--model", own)
    found = emendo_command("generate", "The capital of Bada is", "--model", own, "--tokens", 2, "--json").json
    assert found["before"] == found["after"]
    assert (
        "no checkpoint can do that"
        in emendo_command("export", "--model", own, "--out", tmp_path / "x", code=2).err
    )
    said = emendo_command("export", "--model", own, "--to", "adapters", "--out", tmp_path / "all").out
    index = json.loads((tmp_path / "all" / "index.json").read_text(encoding="utf-8"))
    assert "1 adapters" in said
    assert [(one["edit"], one["folder"]) for one in index["adapters"]] == [(2, "edit-2")]
    assert index["adapters"][0]["scope"] == {"aliases": ["Old Gude"]}
    emendo_command("export", "--model", own, "--to", "gguf-adapters", "--out", tmp_path / "gguf")
    (one,) = json.loads((tmp_path / "gguf" / "index.json").read_text(encoding="utf-8"))["adapters"]
    assert one["file"] == f"emendo-{one['digest'][:32]}.gguf"
    assert (tmp_path / "gguf" / one["file"]).read_bytes().startswith(b"GGUF")
    assert (tmp_path / "all" / "edit-2" / "adapter_model.safetensors").exists()
    mixed = emendo_command("edit", *common, "A", "Oslo", "--into-weights", "--alias", "B", code=2).err
    assert "--subject and --alias are for the memory" in mixed
