"""Shared by the benchmarks: a description of the machine, interleaved timing, quartiles, child processes, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emendo.data.records import read_records
from emendo.data.schema import Record
from emendo.models import loading as models
from emendo.models.lm import LM

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def parser(text: str | None, *, rounds: int = 7) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m", help="as emendo.load takes it")
    made.add_argument("--dtype", default="float32", help="of the model: float32, bfloat16 or float16")
    made.add_argument("--data", default="atlas", help="a record file; by default the built-in facts")
    made.add_argument("--rounds", type=int, default=rounds, help="interleaved runs of every case")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: processor seconds, where others use the machine; with one thread, what a quiet core would take",
    )
    made.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return made


def load(options: argparse.Namespace) -> LM:
    """The model of the command line, with its thread count set."""
    torch.set_num_threads(options.threads)
    return models.load(options.model, dtype=options.dtype)


def facts(options: argparse.Namespace, count: int) -> list[Record]:
    """So many records; the file is gone through again where it has fewer."""
    split = "train" if options.data == "atlas" else None
    found = read_records(options.data, split=split, limit=count, skip_bad=True).records
    return [found[i % len(found)] for i in range(count)]


# ------------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of runs of one thing."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


Times = dict[str, list[float]]
"""Case -> seconds of each round."""


def interleaved(cases: Mapping[str, Callable[[], Any]], options: argparse.Namespace, warm: int = 1) -> Times:
    """Run the cases in turn, ``options.rounds`` times; the first ``warm`` rounds do not count.

    Every second round goes the other way, so that no case always follows the same one.
    """
    times: Times = {name: [] for name in cases}
    for turn in range(warm + options.rounds):
        order = list(cases.items())
        for name, run in order if turn % 2 else reversed(order):
            seconds = timed(run, CLOCKS[options.clock])
            if turn >= warm:
                times[name].append(seconds)
    return times


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes."""
    synchronise()
    before = clock()
    run()
    synchronise()
    return clock() - before


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """How many times as long the first takes, round by round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope ``b`` of ``value = a * size^b``, by least squares on logarithms."""
    logs = torch.tensor([sizes, values], dtype=torch.float64).log()
    x, y = logs - logs.mean(1, keepdim=True)
    return float((x * y).sum() / x.square().sum())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------- memory


def peak() -> float:
    """The most memory that this process has held, in MiB.

    Linux keeps it with the process's memory; ``getrusage`` also remembers the process that started this one, and stands
    in elsewhere.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def in_child(file: str, options: argparse.Namespace, what: Any) -> dict[str, Any]:
    """Run this benchmark's ``child(options, what)`` in a process of its own; returns the JSON that it printed."""
    command = [sys.executable, file, "--child", json.dumps(what)]
    for name in ("model", "dtype", "data", "rounds", "threads", "clock"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------------------------------------- output


def machine(options: argparse.Namespace) -> None:
    """Say where and how this is measured."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0].split(":")[1].strip() if names else platform.processor()
    print(
        f"{processor}, {os.cpu_count()} cores, {options.threads} threads; load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}; {options.model} in {options.dtype}, {options.data}; "
        f"{options.rounds} interleaved rounds, median (quartiles) of "
        f"{'processor' if options.clock == 'cpu' else 'wall-clock'} time",
        end="\n\n",
        flush=True,
    )


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table as Markdown."""
    cells = [list(head), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(f"**{title}**", "", *lines, "", sep="\n", flush=True)


def cell(value: Any) -> str:
    """A figure with three digits, a text as it is."""
    return number(value) if isinstance(value, float) else str(value)
