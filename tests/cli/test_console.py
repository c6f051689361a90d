"""What reaches a terminal: no control character and no markup from data. What reaches a pipe: the exact text."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from cli.samples import Emendo
from emendo.cli import _rich_console, app
from emendo.cli._console import emit
from emendo.cli._rich_console import Console
from emendo.report.tables import printable

NASTY = "The capital\x1b[2J of\x1b]0;owned\x07 [red]Bada[/red] \x9b1m\u202e is"
ANSWER = "Oslo [/red] [bold"


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), 0x2066, 0xDC80])
def test_controls_are_shown(code: int) -> None:
    char = chr(code)
    shown = printable(f"a{char}b")
    if char in "\t\n":
        assert shown == f"a{char}b"
    else:
        assert shown != f"a{char}b" and shown.startswith("a") and shown.endswith("b")
        assert printable(shown) == shown


def test_text_of_every_language_stays() -> None:
    text = "Lyon 北京 ประเทศไทย עברית العربية 👩‍🔬 naïve Ðakovo"
    assert printable(text) == text
    kinds = {unicodedata.category(chr(code)) for code in range(0x11000) if printable(chr(code)) != chr(code)}
    assert kinds == {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("wrap", [str, Text, lambda text: Text.assemble((text, "bold"))])
@pytest.mark.parametrize("inside", ["print", "table", "status"])
def test_a_terminal_gets_no_control_character_and_no_markup(wrap, inside: str) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=200)
    text = wrap(NASTY)
    if inside == "print":
        console.print(text)
    elif inside == "status":
        with console.status(text if isinstance(text, Text) else Text(text)):  # as _console.status does
            pass
    else:
        table = Table(box=None)
        table.add_column("x")
        table.add_row(text)
        console.print(table)
    got = re.sub(r"\x1b\[(\?25[lh]|1A|2K|0m)|\r", "", file.getvalue())  # the cursor of the spinner
    assert got == printable(got)
    assert "\\x1b[2J" in got and "[red]Bada[/re" in got  # a column is measured before controls are replaced


def test_a_pipe_gets_the_exact_text() -> None:
    file = io.StringIO()
    Console(file=file, width=200).print("a\x1b[2J\x9b [red]b[/red] :smile:", soft_wrap=True)
    assert file.getvalue() == "a\x1b[2J\x9b [red]b[/red] :smile:\n"


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": [float("nan"), float("inf"), -float("inf"), 1.5], "b": {"c": (float("nan"), True, None)}}
    emit(value)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "a": [None, None, None, 1.5],
        "b": {"c": [None, True, None]},
    }


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_holds_the_exact_text_and_no_control_character(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    value = f"{NASTY} 北京 é 👩‍🔬 \udc80 \ud83d"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    emit({"prompt": value})
    written = raw.getvalue().decode(encoding)
    assert printable(written) == written
    assert json.loads(written) == {"prompt": value}


# ------------------------------------------------------------------------------------- every command


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(Console):
        def __init__(self, **options: object) -> None:
            super().__init__(**{**options, "force_terminal": True, "color_system": None, "width": 250})

    monkeypatch.setattr(_rich_console, "Console", Terminal)


def _clean(text: str) -> None:
    text = re.sub(r"\x1b\[(\?25[lh]|1A|2K|0m)|\r", "", text)
    assert text == printable(text), text


@pytest.mark.usefixtures("on_a_terminal")
def test_prompts_answers_notes_and_tags(emendo_command: Emendo, model: Path, tmp_path: Path) -> None:
    model = Path(
        shutil.copytree(model, tmp_path / "own")
    )  # a ledger leaves its address in the model's folder
    edit, where = tmp_path / "edit", ("--model", model, "--ledger", tmp_path / "ledger [b]")
    told = [
        emendo_command(
            *("edit", "--editor", "ft", "--set", "steps=1", "--model", model, NASTY, ANSWER),
            *("--paraphrase", NASTY, "--out", edit),
        ),
        emendo_command("generate", "--edit", edit, NASTY, "--tokens", 3),
        emendo_command("apply", edit, "--force", "--note", NASTY, "--by", NASTY, *where),
        emendo_command("tag", NASTY, *where),
        emendo_command("tag", "--list", *where),
        emendo_command("log", *where),
        emendo_command("show", 1, *where),
        emendo_command("doctor", *where),
        emendo_command("checkout", NASTY, *where),
        emendo_command("diff", NASTY, "no \x1b[2J [/red] tag", *where, code=2),
        emendo_command("undo", *where),
    ]
    for said in told:
        _clean(said.out)
        _clean(said.err)
    together = "".join(said.out for said in told)
    assert together.count("[red]Bada[/red]") > 5 and ANSWER in together


@pytest.mark.usefixtures("on_a_terminal")
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "show", NASTY],
        ["generate", "--edit", NASTY, "x"],
        ["edit", "--editor", NASTY, "x", "y"],
        ["edit", "--editor", "ft", "--set", NASTY, "x", "y"],
        ["train", "--out", "x", "--data", NASTY],
        ["train", "--out", "x", "--editor", NASTY],
        ["sites", NASTY],
        ["sites", "x", "--device", NASTY],
        ["log", "--ledger", NASTY],
        [NASTY],
        [f"--{NASTY}"],
        ["undo", f"--{NASTY}"],
        ["apply", NASTY],
        ["import", NASTY, "--out", "x"],
    ],
)
def test_error_messages(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    _clean(result.stdout)
    _clean(result.stderr)
    assert "Bada" in result.stderr


@pytest.mark.slow
def test_a_real_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "emendo",
        "evaluate",
        "show",
        f"{tmp_path}/\x1b[2J\x1b]0;x\x07 [red]z[/red]",
    ]
    subprocess.run(command, stdout=theirs, stderr=theirs, check=False, env={**os.environ, "COLUMNS": "300"})
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "[red]z[/red]" in shown and "\x1b[2J" not in shown and "\x1b]" not in shown and "\x07" not in shown
