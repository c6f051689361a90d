"""Seconds per episode and peak memory of training: emendo against the textbook.

An episode is one edit with a paraphrase and ``--locality`` locality texts, their losses, the gradient and its share of
an optimiser step. Warm: the outputs of the trunk are there already; cold: they are computed in the time measured.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import (
    Spread,
    facts,
    in_child,
    interleaved,
    load,
    machine,
    parser,
    peak,
    ratio,
    table,
    threads,
)
from textbook import Textbook
from torch import nn

from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Episode, Weights
from emendo.models import loading as models
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig, train
from emendo.train.episodes import GROUP, Episodes
from emendo.train.step import training_step

TEXTBOOK_BATCH = 4
SHORT = "emendo, without running text, as the textbook"


class Ours:
    """emendo's training loop without validation and checkpoints: a group of steps, looked ahead at together."""

    def __init__(self, lm: LM, batches: Sequence[Sequence[Episode]], rank: int) -> None:
        self.batches, self.trunk = batches, Trunk(lm.model, find_sites(lm.model))
        self.editor = Mend(find_sites(lm.model), MendConfig(rank=rank)).train()
        self.optimizer = torch.optim.Adam(self.editor.parameter_groups(1e-5), fused=True)
        self.store = TrunkCache(self.trunk)
        self.store.ensure(text for batch in batches for episode in batch for text in episode.texts())
        self.weights = Weights(0.3)

    def warm(self) -> None:
        """One group of steps."""
        for batch, ahead in zip(self.batches, self.editor.look_ahead(self.store, self.batches), strict=True):
            self.optimizer.zero_grad()
            training_step(self.editor, self.store, batch, self.weights, ahead)
            nn.utils.clip_grad_norm_(self.editor.parameters(), 1.0)
            self.optimizer.step()

    def cold(self) -> None:
        """The same with a store that is empty."""
        self.store = TrunkCache(self.trunk)
        self.store.ensure(text for batch in self.batches for e in batch for text in e.texts())
        self.warm()


class Theirs:
    """The textbook's loop."""

    def __init__(self, lm: LM, episodes: Sequence[Episode], rank: int) -> None:
        torch.manual_seed(0)
        self.episodes = episodes
        self.editor = Textbook(lm.model, [site.name for site in find_sites(lm.model)], rank).train()
        self.optimizer = torch.optim.Adam(self.editor.parameters(), 1e-5)

    def step(self) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        self.editor.training_step(self.episodes)
        nn.utils.clip_grad_norm_(self.editor.parameters(), 1.0)
        self.optimizer.step()


def episodes(lm: LM, options: argparse.Namespace, batch: int, near: int, sibling: int) -> list[list[Episode]]:
    """A group of batches of episodes."""
    records = facts(options, max(64, batch * GROUP))
    random.Random(0).shuffle(records)
    drawn = Episodes(lm, records, TrainConfig(batch=batch, near=near, sibling=sibling))
    return [drawn.batch(step) for step in range(GROUP)]


def cases(lm: LM, options: argparse.Namespace) -> dict[str, tuple[Callable[[], None], int]]:
    """Name -> what runs, and how many episodes that is."""
    near = options.locality
    found: dict[str, tuple[Callable[[], None], int]] = {}
    for batch in options.batches:
        batches = episodes(lm, options, batch, near, 0)
        ours = Ours(lm, batches, options.rank)
        found[f"emendo, warm, batches of {batch}"] = (ours.warm, batch * GROUP)
        if batch == options.batch:
            found[f"emendo, cold, batches of {batch}"] = (ours.cold, batch * GROUP)
            for dtype in options.others:
                other = Ours(models.load(options.model, dtype=dtype), batches, options.rank)
                found[f"emendo, warm, batches of {batch}, {dtype}"] = (other.warm, batch * GROUP)
                found[f"emendo, cold, batches of {batch}, {dtype}"] = (other.cold, batch * GROUP)
            few = batches[0][:TEXTBOOK_BATCH]
            for rank in options.textbook_ranks:
                found[f"textbook, rank {rank}"] = (Theirs(lm, few, rank).step, len(few))
            found[f"emendo, warm, batches of {batch}, a sibling more"] = (
                Ours(lm, episodes(lm, options, batch, near, 1), options.rank).warm,
                batch * GROUP,
            )
            if options.textbook_ranks:
                top = max(options.textbook_ranks)
                found[f"emendo, warm, batches of {batch}, rank {top}"] = (
                    Ours(lm, batches, top).warm,
                    batch * GROUP,
                )
    return found


def measure(lm: LM, options: argparse.Namespace) -> None:
    chosen = cases(lm, options)
    reference = next((name for name in chosen if name.startswith("textbook")), None)
    for count in sorted({1, options.threads}):
        with threads(count):
            times = interleaved({name: run for name, (run, _) in chosen.items()}, options)
        each = {name: [t / chosen[name][1] for t in values] for name, values in times.items()}
        rows = [
            (name, Spread.of(values), ratio(each[reference], values) if reference else "")
            for name, values in each.items()
        ]
        plural = "" if count == 1 else "s"
        table(
            f"Training, {count} thread{plural}, seconds per episode",
            ("case", "seconds", "textbook's time over it"),
            rows,
        )


def child(options: argparse.Namespace, what: str) -> dict[str, Any]:
    """Train a little and say what memory the whole process has held."""
    lm = load(options)
    records = facts(options, 600)
    if what == "model":
        lm.next_logits([records[0].prompt])
    elif what == "textbook":
        batches = episodes(lm, options, 8, 1, 0)
        theirs = Theirs(lm, batches[0][:TEXTBOOK_BATCH], 1920)
        for _ in range(2):
            theirs.step()
    else:
        editor = Mend(find_sites(lm.model), MendConfig())
        text = 0 if what == SHORT else 1
        config = TrainConfig(steps=3 * GROUP, batch=8, text=text, validate_every=GROUP, validate_on=50)
        train(lm, editor, records[50:], records[:50], config)
    return {"peak": peak()}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    made.add_argument("--batch", type=int, default=8, help="the batch size at which everything is compared")
    made.add_argument("--rank", type=int, default=MendConfig().rank)
    made.add_argument("--locality", type=int, default=1, help="locality texts of an episode")
    made.add_argument("--textbook-ranks", type=int, nargs="*", default=[1920])
    made.add_argument(
        "--others",
        nargs="*",
        default=["bfloat16"],
        metavar="DTYPE",
        help="number formats of the model to add",
    )
    options = made.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(child(options, json.loads(options.child))))
        return
    machine(options)
    measure(load(options), options)
    rows = [
        (what, in_child(__file__, options, what)["peak"]) for what in ("model", "emendo", SHORT, "textbook")
    ]
    for dtype in options.others:
        options.dtype = dtype
        rows += [
            (f"{what}, {dtype}", in_child(__file__, options, what)["peak"]) for what in ("model", "emendo")
        ]
    table("Peak memory of the whole process, MiB", ("what it does", "MiB"), rows)


if __name__ == "__main__":
    main()
