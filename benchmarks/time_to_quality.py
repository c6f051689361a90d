"""How long until held-out facts are edited well: emendo for ``--minutes``, the textbook for as long or shorter.

Both train on the same records and are scored on the same held-out ones, teacher forced; the time for scoring does
not count, the trunk's does. What a run did not reach within its minutes is given as "not reached". Where emendo did and
the textbook did not, the last column says how long the textbook would take at its measured pace for the episodes that
emendo needed: an estimate, that holds if it learns as much from an episode, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import load, machine, parser, table
from textbook import Textbook
from torch import nn

from emendo.data.records import read_records
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Outcome, Weights
from emendo.models import loading as models
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig
from emendo.train.episodes import GROUP, Episodes
from emendo.train.step import training_step, validation_step

BARS = ((0.5, 0.0, 0.85), (0.8, 0.0, 0.85), (0.9, 0.0, 0.85), (0.7, 0.65, 0.8))
"""Edit success, generalisation, locality."""


@dataclass(frozen=True)
class Point:
    """Scores on the held-out facts after a number of seconds and episodes."""

    seconds: float
    episodes: int
    success: float
    generalisation: float
    locality: float


def scored(editor: Mend, store: TrunkCache, held_out: Sequence[Any], point: tuple[float, int]) -> Point:
    """The scores of an editor."""
    store.ensure(text for batch in held_out for episode in batch for text in episode.texts())
    outcomes = [validation_step(editor, store, batch, Weights(0.3)) for batch in held_out]
    found = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    means = (
        sum(getattr(o, n) for o in found) / len(found) for n in ("success", "generalisation", "locality")
    )
    return Point(*point, *means)


class Race:
    """The two, on the same texts."""

    def __init__(self, lm: LM, plain: LM, options: argparse.Namespace) -> None:
        split = "train" if options.data == "atlas" else None
        found = list(read_records(options.data, split=split, skip_bad=True).records)
        random.Random(0).shuffle(found)
        self.lm, self.plain, self.options, self.sites = lm, plain, options, find_sites(lm.model)
        self.config = TrainConfig(batch=options.batch, variety=options.variety)
        held = TrainConfig(batch=options.batch, sibling=0)
        count = options.held_out
        self.episodes = Episodes(lm, found[count : count + options.records], self.config)
        drawn = Episodes(lm, found[:count], held)
        self.held_out = [drawn.batch(step) for step in range(math.ceil(count / options.batch))]

    def rate(self, done: float, step: int) -> float:
        """Share of the peak learning rate: a rise, then a cosine; ``done`` is the share of the time that has passed."""
        return min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))

    def run(
        self,
        editor: nn.Module,
        groups: list[dict[str, Any]],
        steps: Callable[[int], None],
        mend: Mend,
        lm: LM,
        minutes: float,
    ) -> list[Point]:
        """Train for a number of minutes, with scores on the training model now and then."""
        optimizer = torch.optim.Adam(groups, fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        store = TrunkCache(Trunk(lm.model, self.sites))
        elapsed, step, points, due, seconds = 0.0, 0, [], 0.0, minutes * 60
        while elapsed < seconds:
            before = time.perf_counter()
            optimizer.zero_grad()
            steps(step)
            nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
            for group, top in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = top * self.rate(min(1.0, elapsed / seconds), step)
            optimizer.step()
            elapsed, step = elapsed + time.perf_counter() - before, step + 1
            if elapsed >= due:
                if mend is not editor:
                    mend.load_state_dict(editor.state_dict())
                points.append(scored(mend, store, self.held_out, (elapsed, step * self.options.batch)))
                due = elapsed + seconds / self.options.points
        mend.load_state_dict(editor.state_dict())
        points.append(scored(mend, store, self.held_out, (elapsed, step * self.options.batch)))
        return points

    def ours(self) -> list[Point]:
        """emendo, its trunk cold at the start."""
        editor = Mend(self.sites, MendConfig()).train()
        store = TrunkCache(Trunk(self.lm.model, self.sites))
        looked: dict[int, Any] = {}

        def step(number: int) -> None:
            if number % GROUP == 0:
                for episodes in (self.episodes.window(number), self.episodes.batch(number)):
                    store.ensure(text for episode in episodes or () for text in episode.texts())
                batches = [self.episodes.batch(number + i) for i in range(GROUP)]
                store.ensure(text for batch in batches for episode in batch for text in episode.texts())
                looked.clear()
                looked.update(
                    (number + i, pair)
                    for i, pair in enumerate(zip(batches, editor.look_ahead(store, batches), strict=True))
                )
            batch, ahead = looked[number]
            training_step(editor.train(), store, batch, self.config.weights, ahead)

        groups = editor.parameter_groups(self.config.lr)
        return self.run(editor, groups, step, editor, self.lm, self.options.minutes)

    def textbook(self) -> list[Point]:
        """The textbook, with the learning rate of its own that it is given."""
        names = [site.name for site in self.sites]
        editor = Textbook(self.plain.model, names, self.options.textbook_rank).train()
        networks = [p for name, p in editor.named_parameters() if name != "alpha"]
        lr = self.options.textbook_lr
        groups = [
            {"params": networks, "lr": lr},
            {"params": [editor.alpha], "lr": lr * MendConfig().alpha_lr},
        ]

        def step(number: int) -> None:
            editor.train().training_step(self.episodes.batch(number), self.config.c_edit)

        mend = Mend(self.sites, MendConfig(rank=self.options.textbook_rank)).eval()
        minutes = self.options.textbook_minutes or self.options.minutes
        return self.run(editor, groups, step, mend, self.plain, minutes)


def reached(points: Sequence[Point], bar: tuple[float, float, float]) -> Point | None:
    """The first point at which all three scores are up to the bar."""
    return next(
        (
            p
            for p in points
            if all(s >= b for s, b in zip((p.success, p.generalisation, p.locality), bar, strict=True))
        ),
        None,
    )


def show(curves: dict[str, list[Point]]) -> None:
    """Print the curves and the times."""
    for name, points in curves.items():
        rows = [(f"{p.seconds:.0f}", p.episodes, p.success, p.generalisation, p.locality) for p in points]
        table(name, ("seconds", "episodes", "success", "generalisation", "locality"), rows)
    ours, plain = curves["emendo"], curves["textbook"]
    pace = plain[-1].seconds / plain[-1].episodes
    rows = []
    for bar in BARS:
        mine, theirs = reached(ours, bar), reached(plain, bar)
        estimate = "-"
        if mine and not theirs:
            estimate = f"{mine.episodes * pace:.0f} s ({mine.episodes * pace / mine.seconds:.0f}x)"
        shown = [f"{p.seconds:.0f} s" if p else "not reached" for p in (mine, theirs)]
        measured = f"{theirs.seconds / mine.seconds:.1f}x" if mine and theirs else "-"
        rows.append((" / ".join(map(str, bar)), *shown, measured, estimate))
    head = (
        "success / generalisation / locality at least",
        "emendo",
        "textbook",
        "measured ratio",
        f"estimate: emendo's episodes at {pace:.2f} s each",
    )
    table("Time to quality", head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--minutes", type=float, default=15.0, help="of training")
    made.add_argument(
        "--textbook-minutes", type=float, default=None, help="the textbook's, where they differ"
    )
    made.add_argument("--records", type=int, default=9900)
    made.add_argument("--variety", type=int, default=TrainConfig().variety, help="paraphrases of a record")
    made.add_argument("--held-out", type=int, default=200)
    made.add_argument("--points", type=int, default=20, help="of each curve")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--textbook-rank", type=int, default=1920)
    made.add_argument("--textbook-lr", type=float, default=TrainConfig().lr)
    made.add_argument("--textbook-dtype", default=None, help="of the textbook's model; default: as --dtype")
    made.add_argument("--curves", type=Path, default=None, help="also write the points, as JSON")
    options = made.parse_args(arguments)
    machine(options)
    lm = load(options)
    plain = models.load(options.model, dtype=options.textbook_dtype) if options.textbook_dtype else lm
    race = Race(lm, plain, options)
    curves = {"emendo": race.ours(), "textbook": race.textbook()}
    if options.curves is not None:
        options.curves.write_text(json.dumps({n: [vars(p) for p in own] for n, own in curves.items()}))
    show(curves)


if __name__ == "__main__":
    main()
