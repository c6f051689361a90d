"""What a conversation asks: the last turn, with the names that its pronouns may stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from emendo.memory.words import COMMON, guessed_subject, mention, rarity, words

_OWNER = re.compile(r"\b(?:its|his|their|hers|theirs)\b|\bher\b(?=\s+\w)", re.IGNORECASE)
_PRONOUN = re.compile(r"\b(?:it|he|she|they|him|her|them)\b", re.IGNORECASE)
_MOST_NAMES = 3


def questions(turns: Sequence[str]) -> list[str]:
    """The texts by which a conversation finds an edit, the first one that finds one counts.

    The last turn; then, if it has pronouns, the same with a name for them: that of the nearest turn before which names
    something. A turn that perhaps names nothing, because its only capital letter begins a sentence or it has none, is
    tried and passed over.

    Args:
        turns: what the user said, in order; empty ones do not count.
    """
    said = [turn for turn in turns if turn.strip()]
    if not said or not (_OWNER.search(said[-1]) or _PRONOUN.search(said[-1])):
        return said[-1:]
    return said[-1:] + [_named(said[-1], name) for name in _names(said[:-1])]


def _names(turns: Sequence[str]) -> Iterator[str]:
    """The names that a pronoun in the next turn may stand for, from the nearest turn back."""
    for turn in turns[: -_MOST_NAMES - 1 : -1]:
        if name := _name(turn):
            yield name
            if name != name.lower() and (" " in name or not turn.strip().startswith(name)):
                return


def _name(turn: str) -> str:
    """The name in a turn; without capital letters the last word that is not common."""
    found = words(turn)
    if turn != turn.lower():
        return mention(guessed_subject(turn, found), turn)
    return next((word for word in reversed(found) if rarity()(word) > COMMON), "")


def _named(turn: str, name: str) -> str:
    """A turn with a name for its pronouns."""
    owned = _OWNER.sub(lambda _: f"{name}'s", turn)
    return _PRONOUN.sub(lambda _: name, owned)
