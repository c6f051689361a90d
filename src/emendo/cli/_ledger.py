"""Shared by the commands of the ledger: options, opening the ledger, and lines about edits and states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emendo.cli._console import note

if TYPE_CHECKING:
    from emendo.ledger import Entry, Ledger, Operation
    from emendo.ledger.guard import Examination
    from emendo.ledger.workspace import Workspace
    from emendo.models.loading import LM

Where = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="WHERE",
        help="The ledger: a folder, or an SQLAlchemy URL such as postgresql+psycopg://user@host/name.  "
        "[default: emendo-ledger in the model's folder; for a model known by a name, in the user's data folder]",
    ),
]
By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Your name.  [default: the user]")]
Note = Annotated[str, typer.Option("--note", metavar="TEXT", help="A comment.")]
Force = Annotated[
    bool, typer.Option("--force", help="Apply an edit even if the guard refuses it; the ledger records that.")
]
Paraphrases = Annotated[
    list[str] | None,
    typer.Option(
        "--paraphrase", metavar="TEXT", help="A paraphrase that must reach the target too (may be repeated)."
    ),
]
IntoWeights = Annotated[
    bool,
    typer.Option(
        "--into-weights",
        help="Add the edit to the weights, where it changes every answer, instead of putting it into the memory.",
    ),
]
Aliases = Annotated[
    list[str] | None,
    typer.Option(
        "--alias", metavar="NAME", help="Another name of the subject, for the memory (may be repeated)."
    ),
]
Subject = Annotated[
    str | None,
    typer.Option(
        "--subject",
        metavar="NAME",
        help="The subject as the prompt names it, for the memory.  [default: guessed]",
    ),
]
_GUARD = "Guard"
Probes = Annotated[
    str | None,
    typer.Option(
        "--probes",
        metavar="FILE",
        help="Prompts whose answers must not change, besides the built-in ones: one a line, as plain text or as "
        '{"prompt": "...", "answer": "..."}.',
        rich_help_panel=_GUARD,
    ),
]
Passage = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A plain text whose perplexity is measured instead of that of the built-in one.",
        rich_help_panel=_GUARD,
    ),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="KEY=VALUE",
        help="A limit of the guard, such as perplexity=1.1 (may be repeated); an unknown key lists them all.",
        rich_help_panel=_GUARD,
    ),
]


def find_ledger(model: str, where: str | None) -> Ledger:
    """The ledger of a model, without loading the model where their names or a pointer show that they belong together.

    Raises:
        MismatchError: the ledger belongs to another model.
        StorageError: there is none, or it is damaged or from a newer emendo.
    """
    from emendo.ledger.place import open_ledger

    def fingerprint() -> str:
        from emendo.cli._loading import load_model

        return load_model(model, "float32", None).fingerprint

    return open_ledger(model, fingerprint, where)


def open_workspace(
    lm: LM,
    where: str | None,
    *,
    create: bool = False,
    probes: str | None = None,
    passage: str | None = None,
    limits: Sequence[str] | None = None,
) -> Workspace:
    """A model with its ledger and guard.

    Raises:
        StorageError: there is no ledger and none is to be created, or it is damaged or from a newer emendo.
        DataError: a file of probes or text cannot be read.
        RequestError: an unknown limit.
    """
    from dataclasses import replace
    from pathlib import Path

    from emendo._settings import parse_settings
    from emendo.errors import DataError
    from emendo.ledger.health import Limits
    from emendo.ledger.probes import Probes, read_prompts
    from emendo.ledger.workspace import Workspace

    chosen = Probes()
    if probes is not None:
        chosen = replace(chosen, prompts=(*chosen.prompts, *read_prompts(probes)))
    if passage is not None:
        try:
            chosen = replace(chosen, passage=Path(passage).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"--text {passage} cannot be read: {error}") from error
    given = [_present_name(limit) for limit in limits or ()]
    bounds = parse_settings(Limits, given, "--limit", "the guard has no limit")
    return Workspace.open(lm, where, create=create, probes=chosen, limits=bounds)


def _present_name(limit: str) -> str:
    """A limit by the name that it has now, with a warning for an old one."""
    from emendo.ledger.health import STORED_NAMES

    name, sign, value = limit.partition("=")
    for now, old in STORED_NAMES.items():
        if name.strip() == old:
            note(f"Warning: --limit {old} is now called {now}; the old name will be removed.")
            return f"{now}{sign}{value}"
    return limit


def scope(
    into_weights: bool, subject: str | None, paraphrases: Sequence[str] | None, aliases: Sequence[str] | None
) -> dict[str, Any] | None:
    """The scope of an edit from the options; None puts it into the weights.

    Raises:
        RequestError: options for the memory and for the weights.
    """
    from emendo.errors import RequestError

    if into_weights and (subject or aliases):
        raise RequestError("--subject and --alias are for the memory; leave --into-weights out.")
    if into_weights:
        return None
    given = {"subject": subject, "paraphrases": paraphrases, "aliases": aliases}
    return {name: value for name, value in given.items() if value}


def state_of(text: str) -> int | str:
    """A state as given on the command line: an operation's number, or the name of a tag."""
    return int(text) if text.isdecimal() and len(text) < 20 else text


def requests_line(entry: Entry, length: int = 60) -> str:
    """The first request of an edit, in a line."""
    if not entry.requests:
        return f"({entry.editor})"
    first = entry.requests[0]
    more = f" and {len(entry.requests) - 1} more" if len(entry.requests) > 1 else ""
    prompt = first["prompt"] if len(first["prompt"]) <= length else f"{first['prompt'][: length - 1]}…"
    return f"{prompt} → {first['target']}{more}"


_FIGURES = {
    "edit_success": "reached {:.0%}",
    "paraphrase_success": "paraphrases {:.0%}",
    "changed": "changed {:.1%}",
    "kl": "KL {:.2g}",
    "perplexity": "perplexity x{:.3f}",
    "norm": "||dW||/||W|| {:.2%}",
}


def health_line(health: Mapping[str, Any] | None) -> str:
    """The guard's figures in a line."""
    from emendo.ledger.health import read_figures

    found = read_figures(health)
    return ", ".join(text.format(found[name]) for name, text in _FIGURES.items() if name in found)


def examination_line(found: Examination) -> str:
    """The result of an examination, in a line."""
    if not found.outcomes:
        return "No edit is active: this is the base model."
    drift = found.drift
    perplexity = "" if drift.perplexity is None else f", perplexity x{drift.perplexity:.3f}"
    lost = [each.entry.id for each in found.lost]
    named = f" (not: {', '.join(map(str, lost[:10]))}{', …' if len(lost) > 10 else ''})" if lost else ""
    return (
        f"{len(found.outcomes)} active, {len(found.outcomes) - len(lost)} hold{named}; against the base model "
        f"{drift.changed:.1%} of the probes changed, KL {drift.kl:.2g}{perplexity}."
    )


def state_line(operation: Operation) -> str:
    """The number of active edits after an operation, in a line."""
    count = operation.active_count
    return f"Operation {operation.id}: {count} edit{'' if count == 1 else 's'} active."
