"""`emendo evaluate --routed` on a tiny model."""

from __future__ import annotations

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
