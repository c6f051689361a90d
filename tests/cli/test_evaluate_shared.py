"""`emendo evaluate` in two processes, as `torchrun` starts them, on the gloo backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.samples import Emendo
from cli.teams import ended, start
from emendo.evaluate import intervals

TIMES = ("seconds_per_edit", "seconds_per_edit_in_batch", "cost")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    emendo_command: Emendo, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        intervals.bootstrap_interval.__kwdefaults__, "draws", intervals.DRAWS
    )  # as in a new process
    intervals._mean_bootstrap.cache_clear()
    ways = ("--no-generated", "--no-damage", "--batch", "2", "--limit", "5")
    options = ("evaluate", "--editor", "ft", "--model", model, "--set", "steps=1", "--data", facts, *ways)
    alone = emendo_command(*options, "--out", tmp_path / "alone", "--json").json
    said = ended(start(2, *options, "--out", tmp_path / "shared", "--json"))
    assert said[1][0] == ""  # the first speaks for all
    shared = json.loads(said[0][0])
    kept = emendo_command("evaluate", "show", tmp_path / "shared", "--json").json
    for figures in (alone, shared, kept):
        del figures["protocol"]["seconds_per_edit"]  # tests in one process time fewer edits
        for name in TIMES:
            figures.pop(name)
    assert shared == alone
    assert shared == kept
