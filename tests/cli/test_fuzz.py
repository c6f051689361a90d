"""Random command lines: whatever is given, a command ends with 0, 2 or 130, with a message and without a traceback."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.samples import Emendo
from emendo.cli import app
from emendo.cli._app import COMMANDS as LISTED
from emendo.cli._app import load

SECONDS = 30
"""After which a command counts as stuck."""

NUMBERS = (
    "0",
    "1",
    "2",
    "-1",
    "99999999999999999999",
    "-9223372036854775809",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "0.5",
)
TEXTS = (
    "",
    " ",
    "x",
    "\x1b[2J",
    "[red]",
    "[/red]",
    "\u202eabc",
    "a\nb",
    "é北京",
    "\udc80",
    "\x00",
    "-",
    "{}",
    "x" * 5000,
)
PATHS = (
    *(
        "model",
        "model/config.json",
        "edit",
        "run",
        "run/editor",
        "facts.jsonl",
        "missing",
        "missing/x",
        "folder",
        ".",
    ),
    *(
        "..",
        "empty",
        "binary",
        "nested.json",
        "nan.json",
        "pipe",
        "link",
        "circle",
        "broken",
        "locked",
        "/dev/null",
    ),
    *(
        "/dev/full",
        "/dev/zero",
        "/proc/self/mem",
        "~nosuchuser/x",
        "n" * 300,
        "sqlite:///x",
        "postgresql://h/x",
        "://",
    ),
)
WORDS = (
    "mend",
    "ft",
    "cache",
    "lora",
    "atlas",
    "mlp",
    "all",
    "*",
    "cpu",
    "meta",
    "cuda:9",
    "float16",
    "peft",
    "merged",
)
VALUES = (*NUMBERS, *TEXTS, *PATHS, *WORDS)

GROUP = typer.main.get_command(app)
COMMANDS = {name: load(name) for name in LISTED}
LIMITS = {
    "train": ("--steps", "1", "--minutes", "0.001", "--limit", "8", "--batch", "2", "--validate-on", "2"),
    "demo": ("--steps", "1", "--minutes", "0.001", "--limit", "8", "--facts", "1"),
    "evaluate": ("--limit", "1", "--batch", "1", "--no-damage"),
    "fuse": ("--limit", "1"),
    "generate": ("--tokens", "2"),
}
"""Options that end what would take long; the last one given counts."""


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    # Only the seed is hypothesis's: what it draws part by part is mutated into near repetitions.
    dice = random.Random(draw(st.integers(0, 2**64 - 1)))
    name = dice.choice(sorted(COMMANDS))
    words = name.split()
    if any("--model" in param.opts for param in COMMANDS[name].params):
        words += ["--model", "model"]  # the last one given counts
    for param in COMMANDS[name].params:
        if param.param_type_name == "argument":
            words += dice.choices(VALUES, k=dice.choice((0, 1, 1, 1, 2)))
        elif param.required or dice.random() < 0.15:
            words.append(dice.choice([*param.opts, *param.secondary_opts]))
            words += [] if param.is_flag else [dice.choice(VALUES)]
    return [*words, *dice.choices(VALUES, k=dice.random() < 0.1), *LIMITS.get(name, ())]


@pytest.fixture(scope="module")
def workplace(
    model: Path, facts: Path, trained: Path, edit_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for source, name in ((model, "model"), (trained, "run"), (edit_folder, "edit")):
        shutil.copytree(source, root / name)
    shutil.copy(facts, root / "facts.jsonl")
    (root / "folder").mkdir()
    (root / "empty").write_bytes(b"")
    (root / "binary").write_bytes(bytes(range(256)) * 20)
    (root / "nested.json").write_text("[" * 100_000)
    (root / "nan.json").write_text('{"prompt": NaN, "target": 1' + "0" * 5000 + "}")
    (root / "locked").write_text("x")
    (root / "locked").chmod(0)
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("facts.jsonl")
    (root / "circle").symlink_to("circle")
    (root / "broken").symlink_to("nowhere")
    return root


@contextmanager
def limits(folder: Path) -> Iterator[None]:
    """Work in a folder, with a limit of memory and time."""

    def stuck(*_: object) -> None:
        pytest.fail("the command is stuck")

    before, handler = Path.cwd(), signal.signal(signal.SIGALRM, stuck)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        os.chdir(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@settings(max_examples=2000, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(words=command_lines())
def test_command_lines(workplace: Path, words: list[str]) -> None:
    homes = {name: str(workplace / "home") for name in ("EMENDO_CACHE", "EMENDO_HOME", "HOME")}
    with limits(workplace):
        result = CliRunner().invoke(app, words, env=homes)
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    assert result.exit_code in (0, 2, 130), (words, result.output)
    assert "Traceback" not in result.output, words
    assert "This is a fault in emendo" not in result.output, (words, result.output)
    if result.exit_code == 2:
        errors = sum(line.startswith("Error: ") for line in result.stderr.splitlines())
        assert errors == 1 or "Usage: " in result.stderr, (words, result.stderr)
    assert (workplace / "facts.jsonl").stat().st_size > 0 and (workplace / "model" / "config.json").exists()


def test_every_command_is_among_them(emendo_command: Emendo) -> None:
    assert set(COMMANDS) >= {"train", "edit", "generate", "evaluate", "apply", "export", "doctor"}
