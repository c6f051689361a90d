"""Training on a model that does not fit into memory: the peak with its blocks in memory, and with them in its files.

Each run is a process of its own, which trains an editor for some steps and reports the most memory it held: all of it,
and of that the anonymous part, which only the process can free, and the part that maps files, which the system takes
back when it needs room. Weights count as files in both ways, since transformers maps them where their format allows.
There is no hard limit: RLIMIT_DATA counts the whole of each mapped file, read or not.

The model is the built-in one, and a random Llama of 3B shape in bfloat16, written block by block into ``--folder`` (6.4
GB, removed at the end).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import facts, machine, parser, table
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from emendo.editors.mend import Mend, MendConfig
from emendo.models import loading
from emendo.models.sites import find_sites
from emendo.train import TrainConfig, train
from emendo.train.processes import World

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
"""Llama-3.2-3B."""
PASSAGES = [
    "The committee published its report on the condition of the bridges in the northern districts last week.",
    "A good loaf of bread needs flour, water, salt and time; everything else is a matter of taste and patience.",
    "In the evening the harbour is quiet, and the boats that went out in the morning lie side by side at the pier.",
]
TRAINED, HELD_OUT = 40, 8
"""Facts."""


def write_random(folder: Path, tokenizer: str) -> int:
    """A random model, a file for each block; returns the bytes of its weights."""
    config = LlamaConfig(**SHAPE, dtype="bfloat16")
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in empty.named_parameters():
        part = name.split(".layers.")[-1].split(".")[0] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    total, where = 0, {}
    for file, shapes in files.items():
        tensors = {}
        for name, shape in shapes.items():
            values = torch.ones(shape) if len(shape) == 1 else torch.empty(shape)
            if len(shape) > 1:
                values.uniform_(-0.03, 0.03, generator=generator)
            tensors[name] = values.to(torch.bfloat16)
            total += tensors[name].nbytes
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return total


class Memory:
    """The most memory that this process held, by kind, in MiB."""

    kinds = ("RssAnon", "RssFile")

    def __init__(self) -> None:
        self.most = dict.fromkeys(self.kinds, 0.0)

    def now(self) -> dict[str, float]:
        """What it holds, in MiB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        held = dict(line.split(":", 1) for line in lines if ":" in line)
        return {kind: int(held[kind].split()[0]) / 2**10 for kind in (*self.kinds, "VmHWM")}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look a hundred times a second."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.01):
                seen = self.now()
                self.most |= {kind: max(self.most[kind], seen[kind]) for kind in self.kinds}

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def child(options: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    """Load a model, train an editor, and say how much memory that took."""
    torch.set_num_threads(options.threads)
    memory = Memory()
    imports = memory.now()
    times = {}
    with memory.watched():
        began = time.perf_counter()
        lm = loading.load(
            asked["model"], dtype=asked["dtype"], device_map="disk" if asked["offload"] else None
        )
        times["load"] = time.perf_counter() - began
        began = time.perf_counter()
        lm.fingerprint  # noqa: B018 - reads all weights
        torch.manual_seed(0)
        editor = Mend(find_sites(lm.model), MendConfig())
        times["prepare"] = time.perf_counter() - began
        records = facts(options, TRAINED + HELD_OUT)
        config = TrainConfig(
            steps=asked["steps"], validate_every=asked["steps"], validate_on=HELD_OUT, checkpoint_every=1e9
        )
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=options.folder) as out:
            made = train(
                lm,
                editor,
                records[:TRAINED],
                records[TRAINED:],
                config,
                out=Path(out),
                passages=PASSAGES,
                world=World(),
            )
        times["train"] = time.perf_counter() - began
    last = made.history[-1]
    return {
        **times,
        **memory.most,
        "imports": imports["VmHWM"],
        "peak": memory.now()["VmHWM"],
        "loss": last["validation loss"],
        "parameters": sum(p.numel() for p in editor.parameters()) / 1e6,
    }


def run(options: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    """The child's figures."""
    command = [sys.executable, __file__, "--child", json.dumps(asked), "--threads", str(options.threads)]
    command += ["--folder", str(options.folder), "--data", options.data]
    cache = options.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)  # nothing is kept between two runs
    known = loading.cache_folder()
    (cache / "models").mkdir(parents=True)
    if options.model in loading.BUILT_IN and (known / "models" / options.model).exists():
        (cache / "models" / options.model).symlink_to(known / "models" / options.model)
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "EMENDO_CACHE": str(cache)},
    )
    if done.returncode:
        raise RuntimeError(f"The run has ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(title: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the runs of one model."""
    head = (
        "blocks",
        "peak, MiB",
        "beyond the imports",
        "anonymous",
        "of files",
        "load, s",
        "sites and fingerprint, s",
        "training, s",
        "validation loss",
    )
    cells = []
    for name, found in rows:
        beyond = found["peak"] - found["imports"]
        figures = (
            *(found[kind] for kind in ("RssAnon", "RssFile", "load", "prepare", "train")),
            f"{found['loss']:.5f}",
        )
        cells.append((name, found["peak"], beyond, *figures))
    table(title, head, cells)


def built_in(options: argparse.Namespace) -> None:
    """The built-in model in both ways."""
    rows = []
    for offload in (False, True):
        asked = {
            "model": options.model,
            "dtype": options.dtype,
            "offload": offload,
            "steps": options.steps,
        }
        rows.append(("in its files" if offload else "in memory", run(options, asked)))
    lm = loading.load(options.model, dtype=options.dtype)
    size = sum(p.nbytes for p in lm.model.parameters()) / 2**20
    show(f"{options.model} in {options.dtype}: {size:.0f} MiB of weights, {options.steps} steps of 8", rows)


def random_3b(options: argparse.Namespace) -> None:
    """A random Llama of 3B shape."""
    folder = options.folder / "random-3b"
    folder.mkdir()
    try:
        tokenizer = loading.load(options.model).files
        assert tokenizer is not None
        size = write_random(folder, str(tokenizer.source)) / 2**20
        asked = {
            "model": str(folder),
            "dtype": "bfloat16",
            "offload": True,
            "steps": options.steps,
        }
        found = run(options, asked)
        show(
            f"Random Llama of 3B shape: {size:.0f} MiB of weights in bfloat16, {options.steps} steps of 8, an "
            f"editor of {found['parameters']:.1f} million parameters",
            [("in its files", found)],
        )
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--steps", type=int, default=5)
    made.add_argument(
        "--folder", type=Path, default=None, help="where to write; by default a temporary folder"
    )
    made.add_argument("--parts", nargs="+", default=["built-in", "3b"], choices=["built-in", "3b"])
    options = made.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(child(options, json.loads(options.child))))
        return
    machine(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        for part in options.parts:
            {"built-in": built_in, "3b": random_3b}[part](options)


if __name__ == "__main__":
    main()
