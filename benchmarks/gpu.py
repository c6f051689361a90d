"""Time and memory of training and editing large models, with random weights: one command, no network, no files.

``--device cuda`` (the default where there is a GPU) runs the shapes of GPT-2-XL, a Llama of 1B and GPT-J-6B with the
model in bfloat16 and the editor in float32; ``--tiny`` runs small shapes of the same kinds, also on a processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Spread, peak, synchronise, table
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig

from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Episode, Weights
from emendo.models.sites import find_sites
from emendo.models.text import Text
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train.episodes import GROUP
from emendo.train.step import training_step

SHAPES: dict[str, Callable[[], Any]] = {
    "GPT-2-XL": lambda: GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "Llama-1B": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "GPT-J-6B": lambda: GPTJConfig(),
}
TINY: dict[str, Callable[[], Any]] = {
    "GPT-2, tiny": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=4, n_head=4),
    "Llama, tiny": lambda: LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "GPT-J, tiny": lambda: GPTJConfig(vocab_size=300, n_embd=32, n_layer=4, n_head=4, rotary_dim=8),
}


def batches(vocabulary: int, batch: int) -> list[list[Episode]]:
    """A group of batches of random texts of 8 to 16 tokens, two of them the answer."""
    generator = torch.Generator().manual_seed(0)

    def text() -> Text:
        length = int(torch.randint(8, 17, (), generator=generator))
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        return Text(tuple(ids.tolist()), length - 2)

    return [[Episode(text(), text(), (text(),)) for _ in range(batch)] for _ in range(GROUP)]


class Run:
    """A random model with an untrained editor, and the measurements on it."""

    def __init__(self, config: Any, options: argparse.Namespace) -> None:
        self.device, self.batch = torch.device(options.device), options.batch
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
            self.editor = Mend(find_sites(model), MendConfig(rank=options.rank)).to(self.device)
        self.model = model.eval().requires_grad_(False)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.batches = batches(config.vocab_size, options.batch)
        self.store = TrunkCache(Trunk(model, self.editor.sites))
        self.optimizer = torch.optim.Adam(self.editor.parameter_groups(1e-6), fused=True)

    def cold(self) -> None:
        """The trunk of a group of steps."""
        self.store = TrunkCache(self.store.trunk)
        self.store.ensure(text for batch in self.batches for episode in batch for text in episode.texts())

    def train(self) -> None:
        """A group of steps from a warm trunk."""
        for batch, ahead in zip(self.batches, self.editor.look_ahead(self.store, self.batches), strict=True):
            self.optimizer.zero_grad()
            training_step(self.editor.train(), self.store, batch, Weights(0.3), ahead)
            nn.utils.clip_grad_norm_(self.editor.parameters(), 1.0)
            self.optimizer.step()

    @torch.no_grad()
    def edit(self) -> None:
        """One edit, from the text."""
        text = self.batches[0][0].edit
        self.editor.eval()(edit_factors(self.store.trunk, self.editor.sites, [text]))

    @torch.no_grad()
    def forward(self) -> None:
        """One pass of the model over the same text."""
        self.model(torch.tensor([self.batches[0][0].edit.inputs], device=self.device), use_cache=False)

    def memory(self) -> float:
        """MiB at the most."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else peak()


def measured(run: Callable[[], None], rounds: int) -> Spread:
    """Milliseconds of a call; two calls first that do not count."""
    times = []
    for turn in range(rounds + 2):
        synchronise()
        before = time.perf_counter()
        run()
        synchronise()
        if turn > 1:
            times.append(time.perf_counter() - before)
    return Spread.of(times).scaled(1e3)


def rows(name: str, config: Any, options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """One model's line of each table."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run(config, options)
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters()) / 2**20
    forward = measured(run.forward, options.rounds)
    edit = measured(run.edit, options.rounds)
    after_edit = run.memory()
    cold = measured(run.cold, options.rounds)
    train = measured(run.train, options.rounds)
    each = options.batch * GROUP
    figures = (forward, edit, train.scaled(1 / each), cold.scaled(1 / each))
    return [(name, f"{run.parameters / 1e9:.2f}", *figures, weights, after_edit, run.memory())]


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--tiny", action="store_true", help="small shapes of the same kinds")
    made.add_argument("--only", default="", help="the shapes whose name holds this")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--rank", type=int, default=1920)
    made.add_argument("--rounds", type=int, default=5)
    options = made.parse_args(arguments)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "a processor"
    print(
        f"{name}; torch {torch.__version__}; model {options.dtype}, editor float32 of rank {options.rank}; "
        f"batches of {options.batch}; random weights; {options.rounds} rounds, median (quartiles)\n"
    )
    found = []
    for shape, config in (TINY if options.tiny else SHAPES).items():
        if options.only in shape:
            found += rows(shape, config(), options)
    head = (
        "model",
        "10^9 parameters",
        "forward pass, ms",
        "edit, ms",
        "episode, warm trunk, ms",
        "its trunk, ms",
        "weights, MiB",
        "peak of an edit, MiB",
        "peak of training, MiB",
    )
    table("Training and editing", head, found)


if __name__ == "__main__":
    main()
