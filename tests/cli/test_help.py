"""Help pages cannot drift, and cost no import of torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from emendo import __version__
from emendo.cli import _help_pages as reference
from emendo.cli import app
from emendo.cli._options import TRAINED, UNTRAINED
from emendo.editors.mend import MendConfig
from emendo.train import TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = (
    *("demo", "data", "train", "editors", "edit", "generate", "fuse", "export", "import", "evaluate"),
    *("evaluate show", "evaluate compare", "sites", "stats"),
    *("apply", "serve", "why", "log", "show", "undo", "revert", "diff", "tag", "checkout", "doctor"),
)


def test_the_page_of_help_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.page(), (
        "renew it: python -m emendo.cli._help_pages > docs/cli.md"
    )


def test_every_command_has_a_sentence_an_example_and_help_for_every_option(emendo_command) -> None:
    commands = emendo_command("--help").out.split("Commands:")[1]
    listed = re.findall(r"^  (\w+(?: \w+)?)  ", commands, re.MULTILINE)
    assert tuple(listed) == COMMANDS
    for command in COMMANDS:
        page = emendo_command(*command.split(), "--help").out
        assert re.search(rf"Examples?:\n    emendo {command}", page), command
        options = page.split("\nOptions:\n")[1]
        for option in re.findall(r"^  (--.*)$", options, re.MULTILINE):
            assert re.search(r"  \S", option) or option.endswith("-h"), (command, option)


def test_defaults_that_the_help_shows_are_those_of_the_training_loop(emendo_command) -> None:
    page = " ".join(emendo_command("train", "--help").out.split())
    for field in fields(TrainConfig):
        if field.name in ("minutes", "text"):
            continue
        flag = "--" + field.name.replace("_", "-")
        found = re.search(rf" {flag} [NX] .*?\[default: ([^\]]+)\]", page)
        assert found, flag
        assert float(found[1]) == field.default, flag
    assert re.search(rf"--rank R .*?\[default: {MendConfig().rank}\]", page)
    assert f"The editing method: {', '.join(TRAINED)}." in page


@pytest.mark.parametrize("command", ["edit", "evaluate"])
def test_methods_that_need_no_training_are_listed(emendo_command, command: str) -> None:
    page = "".join(emendo_command(command, "--help").out.split())
    assert f"amethodthatneedsnotraining:{','.join(UNTRAINED)}." in page  # lines break at hyphens too


def test_version(emendo_command) -> None:
    assert emendo_command("--version").out == f"emendo {__version__}\n"


def imported_by(*args: str, **environment: str) -> tuple[str, set[str]]:
    """What a command line prints, and the modules that it imports."""
    program = (
        "import sys; from emendo.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout, set(done.stderr.split())


def test_help_imports_what_it_shows() -> None:
    shown, modules = imported_by("--help")
    assert "Usage: emendo" in shown
    assert not {"torch", "rich", "safetensors", "emendo.cli.train", "emendo.report"} & modules
    shown, modules = imported_by("train", "--help")
    assert "Usage: emendo train" in shown and "emendo.cli.train" in modules
    assert not {"torch", "transformers", "matplotlib", "emendo.cli.edit"} & modules


def test_completion_imports_no_command() -> None:
    words = {"_EMENDO_COMPLETE": "complete_bash", "COMP_WORDS": "emendo ev", "COMP_CWORD": "1"}
    shown, modules = imported_by(**words)
    assert shown.split("\n") == ["evaluate", "evaluate show", "evaluate compare", ""]
    assert not {"torch", "emendo.cli.evaluate"} & modules


def test_options_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_EMENDO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "emendo evaluate show --j")
    monkeypatch.setenv("COMP_CWORD", "3")
    with pytest.raises(SystemExit):
        app(prog_name="emendo")
    assert capsys.readouterr().out == "--json\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--out", "x", "--stepps", "3"], "--stepps"),
        (["train", "--steps", "3"], "Missing option '--out'"),
        (["train", "--out", "x", "--steps", "many"], "Invalid value for '--steps'"),
        (["generate", "--edit", "x", "--tokens", "0", "Hi"], "Invalid value for '--tokens'"),
    ],
)
def test_options_that_do_not_exist_or_fit(emendo_command, args: list[str], message: str) -> None:
    assert message in emendo_command(*args, code=2).err
