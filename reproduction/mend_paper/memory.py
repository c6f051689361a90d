"""Peak memory while an editor trains, above that of the bare model (the paper's Figures 3 and 4, on one processor).

Each figure comes from a process of its own, whose highest resident memory is read once when the model has run and once
more after a few steps of training.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from emendo.data.schema import Record
from emendo.editors import editor_class, trained_class
from emendo.evaluate.intervals import Interval
from emendo.models.lm import LM
from emendo.models.loading import load
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.train import TrainConfig, train
from reproduction.mend_paper.cells import VERSION, Result

BLOCKS = 6
"""Number of blocks of the random models."""
_HEAD = 64  # width of an attention head


@dataclass(frozen=True, slots=True)
class Memory:
    """An editor that trains a few steps on a model.

    Attributes:
        model: a model's name; it gives the tokenizer too.
        editor: the method's name.
        width: of a random model of GPT-2's kind with that tokenizer; 0 takes the model itself.
        settings: of the method, where they are not its defaults.
        batch: facts per step.
        steps: of training.
    """

    model: str
    editor: str
    width: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 8
    steps: int = 3

    def plan(self) -> dict[str, Any]:
        """All its settings, as JSON values."""
        config = editor_class(self.editor).Config(**self.settings)
        return {**asdict(self), "settings": asdict(config), "version": VERSION}


def peak(memory: Memory, model: str | Path, records: Sequence[Record]) -> Result:
    """Train in a new process and return the memory it needed.

    Args:
        memory: the training.
        model: the name or folder to load ``memory.model`` from.
        records: to train on.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(_measure, memory, model, tuple(records), torch.get_num_threads()).result()
    return Result({name: Interval(value, value, value) for name, value in found.items()})


def _measure(memory: Memory, model: str | Path, records: Sequence[Record], threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    lm = load(model)
    if memory.width:
        lm = random_lm(lm, memory.width)
    lm.logits(to_texts(lm, [(r.prompt, r.target) for r in records[: memory.batch]]))
    bare = highest_resident()
    kind = trained_class(memory.editor)
    editor = kind(find_sites(lm.model), kind.Config(**memory.settings))
    train(lm, editor, records, (), TrainConfig(steps=memory.steps, batch=memory.batch, text=0))
    return {
        "memory": highest_resident() - bare,
        "memory_of_model": sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 2**20,
        "model_parameters": float(sum(p.numel() for p in lm.model.parameters())),
        "parameters": float(sum(p.numel() for p in editor.parameters())),
    }


def random_lm(like: LM, width: int) -> LM:
    """A random model of GPT-2's kind with another model's tokenizer, frozen and in eval mode."""
    config = GPT2Config(
        vocab_size=len(like.tokenizer),
        n_embd=width,
        n_layer=BLOCKS,
        n_head=max(1, width // _HEAD),
        n_positions=128,
        bos_token_id=like.tokenizer.eos_token_id,
        eos_token_id=like.tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    return LM(model.eval().requires_grad_(False), like.tokenizer, f"gpt2-{width}")


def highest_resident() -> float:
    """The most memory that this process has held, in MB.

    Linux reports it per process; ``getrusage``, used elsewhere, may include the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
