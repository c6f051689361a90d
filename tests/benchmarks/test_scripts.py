"""Every benchmark runs, on a tiny model and with small settings, and prints its tables."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import _common
import pytest
import torch

from cases import build_lm

pytestmark = pytest.mark.slow  # each starts processes of its own

LATENCY = ["--many", "3", "--rank", "8"]
SCRIPTS = {
    "training_step": ["--batches", "2", "--batch", "2", "--rank", "8", "--textbook-ranks", "8"],
    "edit_latency": LATENCY,
    "apply_overhead": ["--edits", "1", "2", "--tokens", "3", "--rank", "8"],
    "growth": "--edits 1 3 --lengths 8 16 --blocks 1 2 --depths 4 5 --widths 64 128".split(),
    "many_edits": ["--methods", "ft", "fused:lora", "--counts", "1", "3", "--batches", "0", "2"],
    "startup": [],
    "offload": ["--parts", "built-in", "--steps", "1"],
    "routing": ["--limit", "60", "--counts", "10", "200"],
    "serving": "--only edit load kill --editor ft --requests 12 --clients 3 --edits 2 --tokens 3 --kills 1".split(),
    "roofline": ["--batch", "2", "--rank", "8"],
    "time_to_quality": [
        *("--minutes", "0.003", "--records", "40", "--held-out", "8", "--points", "1"),
        *("--batch", "4", "--textbook-rank", "8", "--textbook-dtype", "bfloat16"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model as files, for the children's sake."""
    where = tmp_path_factory.mktemp("model")
    lm = build_lm("llama", max_position_embeddings=512)
    lm.model.save_pretrained(where)
    lm.tokenizer.save_pretrained(where)
    return str(where)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_prints_its_tables(
    name: str,
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # for what is kept between runs
    if name == "training_step":  # its children take seconds each
        monkeypatch.setattr("training_step.in_child", lambda *_: {"peak": 1.0}, raising=False)
    import_module(name).main(["--model", folder, "--rounds", "1", "--threads", "1", *SCRIPTS[name]])
    printed = capsys.readouterr().out
    assert "1 threads" in printed and "| " in printed
    assert "nan" not in printed


def test_the_gpu_benchmark_runs_on_a_processor(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("gpu").main("--device cpu --tiny --rounds 1 --dtype float32 --batch 2 --rank 8".split())
    assert capsys.readouterr().out.count(", tiny") == 3


@pytest.mark.parametrize("what", ["model", "emendo", "textbook"])
def test_the_memory_of_training_is_that_of_a_process(
    what: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["training_step.py"])
    module = import_module("training_step")
    options = _common.parser(None).parse_args(["--model", folder, "--threads", "1"])
    options.locality = 1
    assert module.child(options, what)["peak"] > 1


def test_medians_and_quartiles() -> None:
    spread = _common.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert str(spread.scaled(1000)) == "3000 (2000 to 4000)"
    assert _common.exponent([1, 10, 100], [2, 20, 200]) == pytest.approx(1)
    assert _common.number(0.012345) == "0.0123"


def test_rounds_are_interleaved_and_the_first_does_not_count() -> None:
    order: list[str] = []
    options = _common.parser(None).parse_args(["--rounds", "2"])
    cases = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = _common.interleaved(cases, options)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [len(values) for values in times.values()] == [2, 2]


def test_the_peak_of_a_process_is_above_what_it_holds() -> None:
    held = torch.zeros(2**24)
    assert _common.peak() > held.numel() * 4 / 2**20
