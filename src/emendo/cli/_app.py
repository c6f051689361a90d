"""The program `emendo` and its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from keyword import iskeyword
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from emendo._version import __version__
from emendo.cli import _border

HELP = """Edit language models: give an input and the output you want, get a small, reversible change.

\b
To see it work:         emendo demo
To edit your own model: emendo train, then emendo edit, then emendo generate
To keep many edits:     emendo apply, then emendo log, undo, revert and doctor
"""

COMMANDS = {
    "demo": "Edit a fact, measure the editor on others, write a report.",
    "data": "Show how a file of records is understood.",
    "train": "Train an editor for a model.",
    "editors": "List the trained editors that are at hand by name.",
    "edit": "Make one edit: the answer to PROMPT becomes TARGET.",
    "generate": "Continue a prompt without and with edits.",
    "fuse": "Make one edit that does what many edits do.",
    "export": "Write edits as a PEFT adapter or a merged checkpoint.",
    "import": "Read a PEFT LoRA adapter as an edit.",
    "evaluate": "Measure an editor on facts that it has not seen.",
    "evaluate show": "Trace a figure of an evaluation to its records.",
    "evaluate compare": "Compare two evaluations of the same facts.",
    "sites": "List the matrices that can be edited.",
    "stats": "Take the moments that some editors write around.",
    "apply": "Apply edits to the model's ledger if its guard accepts.",
    "serve": "Serve a model with the edits of its ledger over HTTP.",
    "why": "Show which edit of a memory answers a prompt, and why.",
    "log": "List the changes of a model and its active edits.",
    "show": "Show one edit of the ledger.",
    "undo": "Take the last edits off.",
    "revert": "Take one edit off, wherever it stands.",
    "diff": "Show what lies between two states of a model.",
    "tag": "Name a state of the model.",
    "checkout": "Return to an earlier state of the model.",
    "doctor": "Examine the active edits and what must not have changed.",
}
"""The commands, as the help lists them; each is loaded from its module when it is run."""
HIDDEN = ("compare",)
BARE = ("demo", "editors", "log", "undo", "doctor")
"""Commands that do something useful without any argument."""


def load(name: str) -> Any:
    """A command with its options, from its module."""
    file = name.replace(" ", "_")
    module = import_module(f"emendo.cli.{file}{'_' * iskeyword(file)}")
    program = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    if name in HIDDEN:
        program.command(name, hidden=True, context_settings=module.PASS_ON)(module.run)
    else:
        program.command(name, cls=Command, help=module.HELP, no_args_is_help=name not in BARE)(module.run)
    return typer.main.get_command(program)


class Group(TyperGroup):
    """The group of all commands; :mod:`emendo.cli._border` reports how a command ends.

    It holds a placeholder for each command, which is enough to list and to complete them.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in (*COMMANDS, *HIDDEN):
            self.add_command(TyperCommand(name, short_help=COMMANDS.get(name), hidden=name in HIDDEN))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        args, prog_name = list(sys.argv[1:] if args is None else args), prog_name or "emendo"
        self._main_shell_completion(extra, prog_name, complete_var)

        def command() -> None:
            with self.make_context(prog_name, args[:], **extra) as context:
                self.invoke(context)

        sys.exit(_border.run(command, debug="--debug" in takewhile(lambda word: word.startswith("-"), args)))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find and load a command; one of two words, such as ``evaluate show``, takes precedence over its first word.

        A sub-application of typer cannot do this: the required options of ``evaluate`` would be required here, too.
        """
        two = " ".join(args[:2])
        name, placeholder, rest = super().resolve_command(
            ctx, [two, *args[2:]] if two in self.commands else args
        )
        return name, load(name) if name else placeholder, rest


class Command(TyperCommand):
    """A command whose help shows its options in groups, in the same words whatever the version of typer."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Give the words after the command's name in its usage line."""
        return [
            "[OPTIONS]",
            *(p.metavar or p.name for p in self.get_params(ctx) if p.param_type_name == "argument"),
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the options, then each further group of options under its heading."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            groups.setdefault(getattr(param, "rich_help_panel", None) or kind, []).append(_row(param))
        for heading, rows in groups.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def _row(param: Any) -> tuple[str, str]:
    """Give an option as it is typed, and its help with its default."""
    typed, text = param.metavar or param.name, param.help or ""
    if param.param_type_name == "option":
        names = [", ".join(sorted(part, key=len)) for part in (param.opts, param.secondary_opts) if part]
        typed = " / ".join(names) + ("" if param.is_flag else f" {param.metavar}")
    if param.required:
        text += "  [required]"
    elif not callable(param.default) and param.default not in (None, False, [], ()):
        shown = f"{param.default:g}" if isinstance(param.default, float) else param.default
        text += "" if isinstance(param.default, bool) else f"  [default: {shown}]"
    return typed, text


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"emendo {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with any error.")] = False,
) -> None:
    pass


def build() -> typer.Typer:
    """The program."""
    program = typer.Typer(
        cls=Group,
        help=HELP,
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    program.callback()(_options)
    return program


app = build()
