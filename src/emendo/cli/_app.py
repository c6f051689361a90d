"""The program `emendo` and its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from emendo._version import __version__
from emendo.cli import (
    _border,
    apply,
    checkout,
    compare,
    data,
    demo,
    diff,
    doctor,
    edit,
    editors,
    evaluate,
    evaluate_compare,
    evaluate_show,
    export,
    fuse,
    generate,
    import_,
    log,
    revert,
    show,
    sites,
    tag,
    train,
    undo,
    why,
)

HELP = """Edit language models: give an input and the output you want, get a small, reversible change.

\b
To see it work:         emendo demo
To edit your own model: emendo train, then emendo edit, then emendo generate
To keep many edits:     emendo apply, then emendo log, undo, revert and doctor
"""


MAKING = (
    demo,
    data,
    train,
    editors,
    edit,
    generate,
    fuse,
    export,
    import_,
    evaluate,
    evaluate_show,
    evaluate_compare,
    sites,
)
KEEPING = (apply, why, log, show, undo, revert, diff, tag, checkout, doctor)
COMMANDS = (*MAKING, *KEEPING)
BARE = (demo, editors, log, undo, doctor)
"""Commands that do something useful without any argument."""


class Group(TyperGroup):
    """The group of all commands; :mod:`emendo.cli._border` reports how a command ends."""

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
        """Find a command; one of two words, such as ``evaluate show``, takes precedence over its first word.

        A sub-application of typer cannot do this: the required options of ``evaluate`` would be required here, too.
        """
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


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
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].rstrip("_").replace("_", " ")
        program.command(name, cls=Command, help=module.HELP, no_args_is_help=module not in BARE)(module.run)
    program.command("compare", hidden=True, context_settings=compare.PASS_ON)(compare.run)
    return program


app = build()
