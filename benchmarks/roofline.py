"""How close the phases come to what the processor can do: operations, bytes, and the measured peaks of both.

The peak is the best of some matrix products in the model's dtype, among them a large one; the bandwidth is that of
reading a tensor larger than the caches. The roof is the time that a phase's operations or its bytes alone would take,
whichever is longer. Operations are counted by torch (matrix products only), bytes as the parameters that a phase reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from _common import CLOCKS, Spread, interleaved, load, machine, parser, table, threads, timed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training_step import Ours, episodes

from emendo.editors.objective import outer_losses
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.trunk_cache import TrunkCache
from emendo.train.episodes import GROUP

SHAPES = ((2048, 2048, 2048), (1024, 1024, 4096), (512, 1536, 576), (256, 576, 1536))


class Operations(TorchDispatchMode):
    """Counts the operations of every matrix product that is run inside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count it."""
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def peak_rate(dtype: torch.dtype, clock: Callable[[], float], tries: int) -> tuple[float, str]:
    """Operations a second of the best matrix product, and its shape."""
    best, shape = 0.0, ""
    for n, m, k in SHAPES:
        a, b = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
        seconds = min(timed(lambda a=a, b=b: a @ b.T, clock) for _ in range(tries))
        if 2 * n * m * k / seconds > best:
            best, shape = 2 * n * m * k / seconds, f"[{n}, {k}] x [{k}, {m}]"
    return best, shape


def bandwidth(clock: Callable[[], float]) -> float:
    """Bytes a second of reading a tensor of 256 MiB."""
    large = torch.ones(2**26)
    return 2**28 / min(timed(large.sum, clock) for _ in range(8))


def phases(lm: LM, ours: Ours) -> dict[str, tuple[Callable[[], Any], float]]:
    """Name -> what runs, and the bytes of parameters that it reads, for one group of steps."""
    blocks = lm.model.get_submodule(ours.trunk.stack).children()
    below, above = [], []
    for index, block in enumerate(blocks):
        (below if index < ours.trunk.block else above).append(_bytes(block.parameters()))
    head = lm.model.get_output_embeddings().weight
    suffix = sum(above) + head.numel() * head.element_size()
    own = _bytes(ours.editor.parameters())
    texts = [text for batch in ours.batches for episode in batch for text in episode.texts()]
    ahead = ours.editor.look_ahead(ours.store, ours.batches)

    def outer() -> None:
        for batch, deltas in zip(ours.batches, made, strict=True):
            leaves = {name: LowRank(*map(_leaf, (d.left, d.right))) for name, d in deltas.items()}
            outer_losses(ours.store, leaves, batch, ours.weights, backward=True)

    def editor() -> None:
        for factors in ahead:
            deltas = ours.editor(factors)
            ends = [end for delta in deltas.values() for end in (delta.left, delta.right)]
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    def trunk() -> None:
        TrunkCache(ours.trunk).ensure(texts)

    def optimizer() -> None:
        for _ in ours.batches:
            nn.utils.clip_grad_norm_(ours.editor.parameters(), 1.0)
            ours.optimizer.step()

    with torch.no_grad():
        made = [ours.editor(factors) for factors in ahead]
    editor()
    return {
        "trunk (cold only)": (trunk, sum(below)),
        "looking ahead: factors": (lambda: ours.editor.look_ahead(ours.store, ours.batches), 2 * suffix),
        "outer losses, forward and backward": (outer, 2 * suffix * GROUP),
        "editor, forward and backward": (editor, 3 * own * GROUP),
        "clip and Adam": (optimizer, 7 * own * GROUP),
    }


def _leaf(factor: torch.Tensor) -> torch.Tensor:
    return factor.detach().requires_grad_()


def _bytes(parameters: Iterable[torch.Tensor]) -> float:
    return float(sum(p.numel() * p.element_size() for p in parameters))


def measure(lm: LM, options: argparse.Namespace) -> None:
    """Print the table for one thread and for all."""
    ours = Ours(lm, episodes(lm, options, options.batch, 1, 0), options.rank)
    chosen = phases(lm, ours)
    operations = {}
    for name, (run, _) in chosen.items():
        with Operations() as counter:
            run()
        operations[name] = float(counter.total)
    count = options.batch * GROUP
    for number in sorted({1, options.threads}):
        with threads(number):
            clock = CLOCKS[options.clock]
            top, shape = peak_rate(lm.model.dtype, clock, 4 * options.rounds)
            speed = bandwidth(clock)
            times = interleaved({name: run for name, (run, _) in chosen.items()}, options)
            again, _ = peak_rate(lm.model.dtype, clock, 4 * options.rounds)
        top = max(top, again)
        rows = []
        for name, (_, moved) in chosen.items():
            middle = Spread.of(times[name]).median
            roof = max(operations[name] / top, moved / speed)
            rows.append(
                (
                    name,
                    Spread.of(times[name]).scaled(1e3 / count),
                    operations[name] / count / 1e9,
                    moved / count / 1e6,
                    f"{operations[name] / middle / 1e9:.0f}",
                    f"{operations[name] / middle / top:.0%}",
                    f"{roof / middle:.0%}",
                )
            )
        plural = "" if number == 1 else "s"
        table(
            f"{number} thread{plural}: peak {top / 1e9:.0f} GFLOP/s ({shape}, {lm.model.dtype}), "
            f"{speed / 1e9:.1f} GB/s; batches of {options.batch}",
            ("phase", "ms an episode", "GFLOP", "MB", "GFLOP/s", "of the peak", "of the roof"),
            rows,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--rank", type=int, default=256)
    options = made.parse_args(arguments)
    machine(options)
    measure(load(options), options)


if __name__ == "__main__":
    main()
