"""Progress displays: lines every few seconds, bars on a terminal, nothing by default."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
from rich.console import Console

from emendo import progress
from emendo.cli import _progress
from emendo.progress import SILENT, Lines, Progress


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines: Progress = Lines(written.append, every=5)
    for second in range(13):
        now[0] = float(second)
        lines.update("training", second, 100, {"loss": 0.5, "success": 0.25, "time left": 70.0})
        if second == 6:
            lines.report("step     6", {"loss": 12.345}, "best so far")
    assert written == [
        "training 5/100  loss 0.500  success 25.0%  time left 1:10",
        "step     6  loss 12.3  best so far",
        "training 11/100  loss 0.500  success 25.0%  time left 1:10",
    ]


def test_no_output_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    SILENT.update("edits", 1, 2)
    SILENT.report("step", {"loss": 1.0})
    code = "import emendo, logging; logging.getLogger('emendo.train').warning('a message')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert capsys.readouterr() == ("", "") and child.stdout + child.stderr == ""


def test_progress_can_be_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "emendo"):
        Lines(logging.getLogger("emendo").info, every=0).update("edits", 1, 2)
    assert [record.message for record in caplog.records] == ["edits 1/2"]


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, highlight=False, width=100)
    monkeypatch.setattr(_progress, "messages", lambda: console)
    with _progress.show_progress() as shown:
        shown.update("edits", 3, 3)
        shown.update("training [1]", 4, 9, {"loss": 0.125, "time left": 61.0})
        shown.update("edits", 1, 3)  # a second round
        shown.report("step 4", {"success": 0.5}, "best so far")
    text = screen.getvalue()
    for part in ("training [1]", "4/9", "0.125", "1:01", "1/3", "step 4", "50.0%", "best so far"):
        assert part in text


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "messages", lambda: Console(file=io.StringIO()))
    with _progress.show_progress() as shown:
        shown.update("edits", 1, 3)  # a moment after the start
        shown.report("step [4]", {"success": 0.5})
    assert capsys.readouterr().err == "step [4]  success 50.0%\n"
