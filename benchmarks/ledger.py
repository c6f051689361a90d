"""The cost of the ledger against the number of active edits, on a tiny random model.

Each row is measured at 100, 1,000 and 10,000 active edits, interleaved, and divided by its time at 100. ``apply`` runs
without the guard's probes: the edit is tested on its own prompt with all active edits attached, and stored.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Spread, interleaved, load, machine, number, parser
from transformers import LlamaConfig, LlamaForCausalLM

from emendo import Edit
from emendo.edits.edit import Origin, Request
from emendo.ledger import Ledger, NewEntry
from emendo.ledger.health import Limits
from emendo.ledger.place import open_ledger
from emendo.ledger.probes import Probes
from emendo.ledger.workspace import Workspace
from emendo.low_rank import LowRank
from emendo.models import loading
from emendo.models.lm import LM
from emendo.models.sites import find_sites

LOOSE = Limits(0, 0, *[1e9] * 7)
PROMPT = "The capital of Australia is"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument(
        "--edits", type=int, nargs="+", default=[100, 1000, 10000], help="numbers of active edits"
    )
    options = made.parse_args(arguments)
    machine(options)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        os.environ |= {"EMENDO_HOME": f"{temporary}/home", "EMENDO_CACHE": f"{temporary}/cache"}
        tiny = tiny_model(options, Path(temporary) / "model")
        models = grow(tiny, Path(temporary), sorted(options.edits))
        report(models, options)


def tiny_model(options: argparse.Namespace, folder: Path) -> LM:
    """A random Llama with the tokenizer of the given model, in a folder."""
    like = load(options)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(like.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    like.tokenizer.save_pretrained(folder)
    return loading.load(str(folder))


def random_edit(lm: LM, seed: int) -> Edit:
    """A small change of rank 2 of the last two blocks."""
    torch.manual_seed(seed)
    deltas = {
        site.name: LowRank(1e-4 * torch.randn(site.d_out, 2), torch.randn(2, site.d_in))
        for site in find_sites(lm.model, last=2)
    }
    request = Request(f"The capital of place {seed} is", "Canberra")
    return Edit(deltas, Origin(lm.fingerprint, lm.name, "mend", {}, (request,), "2026-11-01T12:00:00+00:00"))


def grow(lm: LM, folder: Path, counts: Sequence[int]) -> dict[int, LM]:
    """A copy of the model for each number of edits, with a ledger of its own where they are active."""
    ledger = Ledger.create(folder / "growing", lm.fingerprint, lm.name)
    models: dict[int, LM] = {}
    for n in range(counts[-1]):
        edit = random_edit(lm, n)
        requests = tuple({"prompt": r.prompt, "target": r.target} for r in edit.origin.requests)
        ledger.apply(edit.to_bytes(), NewEntry("mend", "0", requests, edit.origin.date, rank=edit.rank))
        if n + 1 in counts:
            model = folder / f"model{n + 1}"
            shutil.copytree(lm.name, model)
            shutil.copytree(folder / "growing", model / "emendo-ledger")
            models[n + 1] = loading.load(str(model))
    return models


def report(models: dict[int, LM], options: argparse.Namespace) -> None:
    """Measure every operation at every size, and print the table."""
    first, *_ = models
    print(f"\n| | {' | '.join(f'{n:,} edits' for n in models)} | ratios to {first:,} |")
    print(f"| --- |{' ---: |' * len(models)} ---: |")
    for name, operation in OPERATIONS.items():
        cases = {str(n): operation(lm) for n, lm in models.items()}
        times = [Spread.of(seconds).scaled(1e3) for seconds in interleaved(cases, options).values()]
        row(name, [f"{number(each.median)} ms" for each in times], [each.median for each in times])
    sizes = [Path(open_ledger(lm.name).where).stat().st_size for lm in models.values()]
    each = [size / n for size, n in zip(sizes, models, strict=True)]
    row("database for each edit", [f"{number(value / 1024)} KB" for value in each], each)


def row(name: str, cells: Sequence[str], values: Sequence[float]) -> None:
    ratios = ", ".join(f"{value / values[0]:.2f}" for value in values[1:])
    print(f"| {name} | {' | '.join(cells)} | {ratios} |", flush=True)


def step(lm: LM) -> Callable[[], Any]:
    """One step of the ledger alone, and its undoing."""
    ledger, seeds = open_ledger(lm.name), iter(range(10**6, 10**7))
    return lambda: (ledger.apply(f"{next(seeds)}".encode(), NewEntry("", "", (), "")), ledger.undo())


def apply(lm: LM) -> Callable[[], Any]:
    """A new workspace that applies an edit, and its undoing."""

    def run() -> None:
        work = Workspace.open(lm, limits=LOOSE, probes=Probes((), ""), recheck_every=0)
        work.apply(random_edit(lm, 10**6))
        work.undo()

    return run


def apply_again(lm: LM) -> Callable[[], Any]:
    """One workspace that applies edit after edit, and its undoing."""
    work = Workspace.open(lm, limits=LOOSE, probes=Probes((), ""), recheck_every=0)
    return lambda: (work.apply(random_edit(lm, 10**6)), work.undo())


def generate(lm: LM) -> Callable[[], Any]:
    """A new workspace that generates eight tokens."""

    def run() -> None:
        with Workspace.open(lm).applied() as edited:
            edited.generate(PROMPT, 8)

    return run


def command(*words: str) -> Callable[[LM], Callable[[], Any]]:
    """A command in a process of its own."""
    program = [sys.executable, "-m", "emendo", *words, "--model"]
    return lambda lm: lambda: subprocess.run([*program, lm.name], check=True, capture_output=True)


OPERATIONS: dict[str, Callable[[LM], Callable[[], Any]]] = {
    "open the ledger": lambda lm: lambda: open_ledger(lm.name),
    "a step and its undoing": step,
    "apply and undo, workspace open": apply_again,
    "open a workspace, apply and undo": apply,
    "open a workspace, generate": generate,
    "`emendo log`": command("log"),
    "`emendo log --json`": command("log", "--json"),
}

if __name__ == "__main__":
    main()
