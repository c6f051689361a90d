"""What the commands of the ledger share: their options, finding the ledger, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

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
        "[default: emendo-ledger in the model's folder, or the user's data folder for a model that is none]",
    ),
]
By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who does it.  [default: the user]")]
Note = Annotated[str, typer.Option("--note", metavar="TEXT", help="Why, in your words.")]
Force = Annotated[
    bool, typer.Option("--force", help="Apply an edit that the guard refuses; the ledger says so.")
]
Paraphrases = Annotated[
    list[str] | None,
    typer.Option(
        "--paraphrase", metavar="TEXT", help="A rewording that must give the target too (may be repeated)."
    ),
]
_GUARD = "Guard"
Probes = Annotated[
    str | None,
    typer.Option(
        "--probes",
        metavar="FILE",
        help='Prompts that must not change besides the built-in ones, one a line, as they are or as {"prompt": "...", '
        '"answer": "..."}.',
        rich_help_panel=_GUARD,
    ),
]
Passage = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A plain text whose perplexity is watched instead of the built-in one.",
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
    """The ledger of a model by its name, without loading the model.

    Raises:
        StorageError: there is none, or it is damaged or from a newer emendo.
    """
    from emendo.ledger.place import open_ledger

    return open_ledger(model, where=where)


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
        StorageError: there is no ledger and none is to be made, or it is damaged or from a newer emendo.
        DataError: a file of the guard's cannot be read.
        RequestError: an unknown limit.
    """
    from dataclasses import replace
    from pathlib import Path

    from emendo.cli._settings import as_settings
    from emendo.errors import DataError
    from emendo.ledger.guard import Limits
    from emendo.ledger.watch import Watched, read_prompts
    from emendo.ledger.workspace import Workspace

    watched = Watched()
    if probes is not None:
        watched = replace(watched, prompts=(*watched.prompts, *read_prompts(probes)))
    if passage is not None:
        try:
            watched = replace(watched, passage=Path(passage).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--text {passage} cannot be read: {error}") from error
    chosen = as_settings(Limits, limits or (), "--limit", "the guard has no limit")
    return Workspace.open(lm, where, create=create, watched=watched, limits=chosen)


def state_of(text: str) -> int | str:
    """An operation's number, or the name of a tag."""
    return int(text) if text.isdecimal() else text


def wishes(entry: Entry, length: int = 60) -> str:
    """What an edit was asked for, in a line."""
    if not entry.requests:
        return escape(f"({entry.editor})")
    first = entry.requests[0]
    more = f" and {len(entry.requests) - 1} more" if len(entry.requests) > 1 else ""
    prompt = first["prompt"] if len(first["prompt"]) <= length else f"{first['prompt'][: length - 1]}…"
    return f"{escape(prompt)} [bold]{escape(first['target'])}[/bold]{more}"


def figures_of(health: Mapping[str, Any] | None) -> str:
    """The guard's figures in a line."""
    if not health:
        return ""
    parts = [f"reached {health['reached']:.0%}"]
    if health.get("reworded") is not None:
        parts.append(f"reworded {health['reworded']:.0%}")
    parts += [f"changed {health['changed']:.1%}", f"KL {health['kl']:.2g}"]
    if health.get("perplexity") is not None:
        parts.append(f"perplexity x{health['perplexity']:.3f}")
    parts.append(f"||dW||/||W|| {health['norm']:.2%}")
    return ", ".join(parts)


def summary(found: Examination) -> str:
    """An examination of the whole stack, in a line."""
    if not found.holdings:
        return "No edit is active: this is the clean model."
    drift = found.drift
    perplexity = "" if drift.perplexity is None else f", perplexity x{drift.perplexity:.3f}"
    lost = [h.entry.id for h in found.holdings if not h.holds]
    named = f" (not: {', '.join(map(str, lost[:10]))}{', …' if len(lost) > 10 else ''})" if lost else ""
    return (
        f"{len(found.holdings)} active, {len(found.holdings) - len(lost)} hold{named}; against the clean model "
        f"{drift.changed:.1%} of the watched prompts changed, KL {drift.kl:.2g}{perplexity}."
    )


def say_state(operation: Operation) -> str:
    """What is active after a step, in a line."""
    count = len(operation.active)
    return f"Operation {operation.id}: {count} edit{'' if count == 1 else 's'} active."
