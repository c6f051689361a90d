"""However a command ends: one message, no traceback, and an exit code of 0, 2 or 130."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.exc
import torch
import typer
from safetensors import SafetensorError

from cli.samples import Emendo
from emendo.cli import _border, _signals, undo
from emendo.errors import ModelError, RequestError, StorageError

PROGRAM = (sys.executable, "-m", "emendo")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ERRORS: list[tuple[BaseException, int, str]] = [
    (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "The disk is full: x/y"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "The disk is full: the output"),
    (OSError(errno.EACCES, "Permission denied", "x"), 2, "Permission denied: x."),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "The name is too long: x."),
    (OSError(errno.ELOOP, "Too many levels", "x"), 2, "Symbolic links lead in a circle: x."),
    (OSError(errno.EXDEV, "Invalid cross-device link", "x"), 2, "Invalid cross-device link: x."),
    (
        caused(StorageError("Cannot write x."), OSError(errno.ENOSPC, "No space")),
        2,
        "The disk is full. Cannot write x.",
    ),
    (
        caused(StorageError("The disk is full."), OSError(errno.ENOSPC, "No space")),
        2,
        "Error: The disk is full.",
    ),
    (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), 2, "PYTHONUTF8=1"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not UTF-8 text"),
    (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
    (MemoryError(), 2, "not enough memory"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        2,
        "not enough memory. CUDA out of",
    ),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
    (OverflowError("Python int too large to convert to C long"), 2, "A number is too large"),
    (ValueError("embedded null byte"), 2, "NUL character"),
    (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "package peft is not installed"),
    (sqlalchemy.exc.OperationalError("select", {}, Exception("locked")), 2, "database of the ledger refused"),
    (SafetensorError("invalid header"), 2, "weights is damaged. (invalid header.)"),
    (KeyError("base_model.model"), 2, "This is a fault in emendo: KeyError: 'base_model.model'"),
    (AssertionError(), 2, "This is a fault in emendo: AssertionError"),
    (IndexError("list\nindex"), 2, "--debug"),
    (KeyboardInterrupt(), 130, "Stopped: nothing was written."),
    (typer.Abort(), 130, "Stopped: "),
    (SystemExit(1), 2, ""),
    (SystemExit("no"), 2, ""),
    (SystemExit(0), 0, ""),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0, ""),
]


@pytest.mark.parametrize(("error", "code", "message"), ERRORS, ids=[repr(case[0])[:40] for case in ERRORS])
def test_every_error(
    emendo_command: Emendo, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(undo.shared, "find_ledger", fail)
    said = emendo_command("undo", code=code)
    assert said.out == "" and "Traceback" not in said.err
    assert message in said.err and len(said.err.splitlines()) == (1 if message else 0)
    if code == 2 and message:
        debug = emendo_command("--debug", "undo", code=2).err
        assert "Traceback (most recent call last)" in debug and message in debug


def test_usage_errors_have_their_usage(emendo_command: Emendo) -> None:
    said = emendo_command("undo", "--nothing", code=2)
    assert said.err.startswith("Usage: root undo [OPTIONS]") and "--nothing" in said.err


# ---------------------------------------------------------------------------------- a real process


def call(words: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, **options}
    env = {**os.environ, **options.pop("env", {})}
    words = [str(word) for word in words]
    return subprocess.run((*PROGRAM, *words), text=True, check=False, timeout=120, env=env, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_a_full_disk_behind_standard_output(words: list[str]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = call(words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "Error: The disk is full: the output could not be written completely.\n"


def test_a_reader_that_went_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = call(["--help"], capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["evaluate", "show", "nowhere"], 2)])
def test_closed_standard_streams(closed: str, words: list[str], code: int, tmp_path: Path) -> None:
    shell = f"exec {' '.join(PROGRAM)} {' '.join(words)} {closed}"
    path = os.pathsep.join(str(Path(part).resolve()) for part in sys.path if part)
    done = subprocess.run(
        ["sh", "-c", shell],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.slow
def test_an_ascii_locale(edit_folder: Path, tmp_path: Path) -> None:
    done = call(["evaluate", "show", tmp_path / "北京"], env=ASCII)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "holds no evaluation" in done.stderr
    done = call(["generate", "--edit", edit_folder, "Đakovo 北京 is", "--json"], env=ASCII)
    assert done.returncode == 2 and "PYTHONUTF8=1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_home_and_a_cache_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env = {"HOME": str(tmp_path / "none"), "EMENDO_CACHE": str(tmp_path / "file" / "cache")}
    done = call(["sites", model], env=env)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        (signal.SIGINT, 0.1),
        (signal.SIGINT, 0.3),
        (signal.SIGINT, 1.0),
        (signal.SIGTERM, 0.5),
        (signal.SIGHUP, 1.5),
    ],
)
def test_a_signal_in_the_first_second(number: signal.Signals, seconds: float, model: Path) -> None:
    process = subprocess.Popen(
        (*PROGRAM, "sites", str(model)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    if process.returncode not in (0, -number):  # done before, or before the program began
        assert process.returncode == 130
        assert err.count("Stopped:") == 1


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (RuntimeError("a library was half loaded"), None, 130),
        (ModelError("the model is damaged"), RuntimeError("a library was half loaded"), 130),
        (StorageError("the disk is full"), OSError("no space"), 2),
        (RequestError("there is nothing to save"), None, 2),
    ],
)
def test_an_error_that_a_stop_causes_is_a_stop(
    error: Exception, cause: Exception | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def half_loaded() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error from cause

    before = signal.signal(signal.SIGINT, _signals._interrupt)
    try:
        assert _border.run(half_loaded) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.startswith("Stopped:" if code == 130 else "Error:")


def test_the_streams_of_a_caller_are_left_open() -> None:
    assert _border.run(lambda: None) == 0
    assert not sys.stdout.closed and not sys.stderr.closed
