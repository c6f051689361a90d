"""`emendo train` in several processes, as `torchrun` starts them, on the gloo backend."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cases import records
from cli.samples import Emendo
from cli.teams import ended, start
from emendo.data import write_records

pytestmark = pytest.mark.slow


@pytest.fixture
def options(model: Path, tmp_path: Path) -> list[object]:
    facts = tmp_path / "facts.jsonl"
    write_records(records(40), facts)
    small = (
        "--set",
        "rank=8",
        "--set",
        "alpha=1e-2",
        "--warmup",
        "2",
        "--text-examples",
        "0",
        "--batch",
        "8",
    )
    asked = (
        "--model",
        model,
        "--data",
        facts,
        "--dtype",
        "float32",
        "--steps",
        "20",
        "--validate-every",
        "10",
    )
    return ["train", *asked, *small]


def same(one: Path, other: Path) -> None:
    """Editor, statistics and figures of two runs are the same except for rounding in float32."""
    ours, theirs = (load_file(folder / "editor" / "editor.safetensors") for folder in (one, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    histories: list[Any] = [json.loads((folder / "history.json").read_text()) for folder in (one, other)]
    assert [sorted(row) for row in histories[0]] == [sorted(row) for row in histories[1]]
    for row, known in zip(*histories, strict=True):
        losses = {name: value for name, value in known.items() if name.endswith("loss")}
        assert {name: row[name] for name in losses} == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_editor_of_one(
    emendo_command: Emendo, options: list[object], tmp_path: Path, size: int
) -> None:
    emendo_command(*options, "--out", tmp_path / "alone")
    said = ended(start(size, *options, "--out", tmp_path / "shared", "--json", cache=tmp_path / "cache"))
    same(tmp_path / "shared", tmp_path / "alone")
    result = json.loads(said[0][0])
    assert result["processes"] == size
    assert result["episodes_per_second"] > 0 and 0 < result["efficiency"] < 1
    assert all((out, err) == ("", "") for out, err in said[1:])  # the first speaks for all


def test_a_killed_process_leaves_a_run_that_another_number_of_processes_finishes(
    emendo_command: Emendo, options: list[object], tmp_path: Path
) -> None:
    emendo_command(*options, "--out", tmp_path / "alone")
    out = tmp_path / "shared"
    running = start(2, *options, "--out", out, "--checkpoint-every", "0", cache=tmp_path / "cache")
    until = time.monotonic() + 240
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < until and running[0].poll() is None
        time.sleep(0.01)
    running[1].kill()
    said = running[0].communicate(timeout=120)[1]
    running[1].communicate()
    assert running[0].returncode == 2
    assert "Another process of this run has ended" in said and "saved at step" in said
    assert f"emendo train --out {out} --resume" in " ".join(said.split())
    emendo_command("train", "--resume", "--out", out)
    same(out, tmp_path / "alone")
