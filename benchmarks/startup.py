"""Start-up of the command line, as ratios to what it cannot avoid.

    python benchmarks/startup.py --rounds 5

`emendo --help` against starting Python with typer; `emendo edit` on the built-in model against importing torch and
transformers and loading the model by hand. Processor seconds of whole processes, interleaved, the median of each.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

PLAIN = "import typer, rich.console; typer.Typer()"
LOADED = "import torch, transformers, emendo; emendo.load('smollm2-135m')"
IMPORTED = "import torch, transformers"
EDIT = ("edit", "The capital of Australia is", "Canberra", "--json")
COMMANDS = {
    "python, typer and rich": (sys.executable, "-c", PLAIN),
    "emendo --help": (sys.executable, "-m", "emendo", "--help"),
    "import torch, transformers": (sys.executable, "-c", IMPORTED),
    "the same, and loading the model": (sys.executable, "-c", LOADED),
    "emendo edit PROMPT TARGET": (sys.executable, "-m", "emendo", *EDIT),
}
PAIRS = (
    ("emendo --help", "python, typer and rich"),
    ("emendo edit PROMPT TARGET", "import torch, transformers"),
    ("emendo edit PROMPT TARGET", "the same, and loading the model"),
)


def seconds(command: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(asked.rounds + 1):
        for name, command in COMMANDS.items():
            found[name].append(seconds(command))
    middle = {
        name: statistics.median(values[1:]) for name, values in found.items()
    }  # the first round warms up
    for name, value in middle.items():
        print(f"{name:<34} {value:6.2f} s of a processor")
    for one, other in PAIRS:
        print(f"{one} / {other}: {middle[one] / middle[other]:.2f}")


if __name__ == "__main__":
    main()
