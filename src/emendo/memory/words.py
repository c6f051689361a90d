"""Words of prompts: how rare they are, the subject among them, and how two prompts compare.

Everything here works for any model and needs no training; the rarity of words comes from a table that ships with
emendo, and a word that is not in it counts as rare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import fsum, log, sqrt
from pathlib import Path

from emendo._subject import find_subject
from emendo._text import normalised

_SINGLE = (
    "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts without spaces: each letter
)
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")
_ENDS = ".?!:"
_SENTENCE = re.compile(r"[.?!:]\s+|[\n\u3002\uff1f\uff01]\s*")
LONGEST = 40
"""Words that are read of a long text, at its end."""
_RARER = 2.0  # in nats
COMMON = 3.5
"""Nats up to which a word is common: "In", "The law in" and "Where is" are no part of a name."""
IDF_FILE = Path(__file__).with_name("idf.json")


def words(text: str) -> tuple[str, ...]:
    """The words of a text, normalised: case, accents' Unicode form and punctuation are gone."""
    return tuple(_WORD.findall(normalised(text)))


class Rarity:
    """The inverse document frequency of words, ``log(n / documents with the word)``.

    Args:
        values: by word.
        unknown: of a word that has no value.
    """

    def __init__(self, values: Mapping[str, float], unknown: float) -> None:
        self.values, self.unknown = values, unknown

    def __call__(self, word: str) -> float:
        """The value of a word."""
        return self.values.get(word, self.unknown)

    def mass(self, of: Iterable[str]) -> float:
        """The sum over some words, in whatever order they come."""
        return fsum(map(self, of))

    @classmethod
    def of(cls, texts: Iterable[str], least: int = 2) -> Rarity:
        """Count the words of texts; words in fewer than ``least`` of them are unknown."""
        counts: dict[str, int] = {}
        n = 0
        for n, text in enumerate(texts, 1):  # noqa: B007
            for word in set(words(text)):
                counts[word] = counts.get(word, 0) + 1
        values = {word: round(log(n / count), 2) for word, count in sorted(counts.items()) if count >= least}
        return cls(values, round(log(max(n, 2)), 2))

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps({"unknown": self.unknown, "values": self.values}, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Rarity:
        """Read a table."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        return cls(kept["values"], kept["unknown"])


@cache
def rarity() -> Rarity:
    """The table that ships with emendo, counted over some 50,000 prompts about facts."""
    return Rarity.load(IDF_FILE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the router reads it.

    Attributes:
        text: as it was typed, or the end of it.
        words: all of them in order.
        known: the same as a set.
        subject: the words of the subject's name, given or guessed.
        mass: the summed rarity of ``known``.
        norm: the length of the vector of rarities.
    """

    text: str
    words: tuple[str, ...]
    known: frozenset[str]
    subject: tuple[str, ...]
    mass: float
    norm: float

    @classmethod
    def read(cls, text: str, subject: str | None = None) -> Prompt:
        """Read a prompt; a subject that is not given, or not named in it, is guessed (:func:`guessed_subject`).

        Of a long text the end is read (:func:`ending`).
        """
        text = ending(text)
        found = words(text)
        return cls.of(
            text, words(subject) if subject and subject in text else guessed_subject(text, found), found
        )

    @classmethod
    def of(cls, text: str, subject: tuple[str, ...], found: tuple[str, ...] | None = None) -> Prompt:
        """A prompt whose subject's words are known, and perhaps all of its words."""
        found = words(text) if found is None else found
        known, rare = frozenset(found), rarity()
        return cls(
            text, found, known, subject, rare.mass(known), sqrt(fsum(rare(word) ** 2 for word in known))
        )


def ending(text: str) -> str:
    """The last sentences of a text, at most :data:`LONGEST` words of them, but at least the last one.

    What a text goes on with depends on its end, and a passage that names a subject somewhere asks for nothing.
    """
    if len(_WORD.findall(text)) <= LONGEST:
        return text
    starts = [match.end() for match in _SENTENCE.finditer(text) if match.end() < len(text)]
    ends = [text[start:] for start in starts]
    return next((end for end in ends if len(_WORD.findall(end)) <= LONGEST), ends[-1] if ends else text)


def guessed_subject(text: str, found: Sequence[str]) -> tuple[str, ...]:
    """The words of the subject: the name that the letters of a prompt show, without common words in front of it.

    If another word is much rarer than the name's, it is that word, unless the name has capital letters and the word has
    none ("premieres" after "Big Love").

    Args:
        text: the prompt.
        found: its words.
    """
    guess, rare = words(find_subject(text)), rarity()
    named = {normalised(word) for word in _WORD.findall(text) if not word.islower()}
    rarest = max(found, key=rare, default="")
    if (
        guess
        and rare(rarest) > max(map(rare, guess)) + _RARER
        and (rarest in named or named.isdisjoint(guess))
    ):
        return (rarest,)
    if guess and rare(guess[0]) < COMMON:
        return guess[
            next((at for at, word in enumerate(guess) if word in named and rare(word) > COMMON), 0) :
        ]
    return guess


EVIDENCE = ("subject", "inside", "coverage", "cosine", "mass", "reverse", "rest", "abbreviation")
"""The lexical evidence, in the order of :func:`compare`."""


def compare(edit: Prompt, query: Prompt) -> tuple[float, ...]:
    """The lexical evidence that a query is in the scope of an edit; each number is from 0 to 1.

    ``subject``: the edit's subject stands in the query. ``inside``: it does, but within a longer name. ``coverage``:
    share of the subject's words in the query, by rarity. ``cosine``: of the TF-IDF vectors. ``mass``: share of the edit
    prompt's words in the query, by rarity. ``reverse``: share of the words of the query's own (guessed) subject in the
    edit's prompt. ``rest``: cosine without the words of the edit's subject. ``abbreviation``: a word in capitals may
    stand for the subject.
    """
    rare = rarity()
    shared = edit.known & query.known
    stands = occurs(edit.subject, query.words)
    own = frozenset(edit.subject)
    square = fsum(rare(word) ** 2 for word in shared)
    without = fsum(rare(word) ** 2 for word in shared - own)
    left = edit.norm**2 - fsum(rare(word) ** 2 for word in own & edit.known)
    right = query.norm**2 - fsum(rare(word) ** 2 for word in own & query.known)
    return (
        float(stands),
        float(stands and _inside(edit, query.text)),
        _share(own, query.known),
        square / max(edit.norm * query.norm, 1e-9),
        rare.mass(shared) / max(edit.mass, 1e-9),
        _share(frozenset(query.subject), edit.known),
        without / max(sqrt(max(left, 0.0) * max(right, 0.0)), 1e-9),
        float(not stands and _abbreviated(edit.subject, query.text)),
    )


def occurs(name: Sequence[str], text: Sequence[str]) -> bool:
    """Whether the words of a name stand in a text, in their order and without gaps."""
    return any(True for _ in _places(name, text))


def mention(name: Sequence[str], text: str) -> str:
    """The first mention of a name as the text spells it; empty where there is none."""
    tokens = [*_WORD.finditer(text)]
    plain = [normalised(token[0]) for token in tokens]
    for at in _places(name, plain):
        return text[tokens[at].start() : tokens[at + len(name) - 1].end()]
    return ""


def _places(name: Sequence[str], text: Sequence[str]) -> Iterator[int]:
    """Where the words of a name stand in those of a text, in their order and without gaps."""
    length = len(name)
    for at in range(len(text) - length + 1) if name else ():
        if text[at] == name[0] and tuple(text[at : at + length]) == tuple(name):
            yield at


def _share(some: frozenset[str], known: frozenset[str]) -> float:
    rare = rarity()
    return rare.mass(some & known) / max(rare.mass(some), 1e-9)


def _inside(edit: Prompt, text: str) -> bool:
    """Whether each mention of an edit's subject continues: a hyphen or a word with a capital letter stands beside it.

    A word that stands in the edit's prompt, too, makes the name no longer one: "The" in "The Midway State".
    """
    tokens = [(match[0], match.start(), match.end()) for match in _WORD.finditer(text)]
    plain = [normalised(token) for token, _, _ in tokens]
    length, longer = len(edit.subject), []
    for at in _places(edit.subject, plain):
        beside = ((at - 1, at - 1), (at + length - 1, at + length))  # left word, and the place of the new one
        longer.append(
            any(
                0 <= new < len(tokens)
                and plain[new] not in edit.known
                and _joined(text, tokens[left], tokens[left + 1], new=new, tokens=tokens)
                for left, new in beside
            )
        )
    return bool(longer) and all(longer)


_Token = tuple[str, int, int]


def _joined(text: str, left: _Token, right: _Token, *, new: int, tokens: Sequence[_Token]) -> bool:
    """Whether two neighbouring words belong to one name, of which the one at place ``new`` is doubtful."""
    gap = text[left[2] : right[1]]
    if gap in ("-", "\u2010", "\u2011"):
        return True
    return gap == " " and tokens[new][0][:1].isupper() and not _opens(text, tokens, new)


def _opens(text: str, tokens: Sequence[_Token], at: int) -> bool:
    """Whether a sentence begins with a word."""
    return at == 0 or text[tokens[at - 1][2] : tokens[at][1]].strip()[-1:] in tuple(_ENDS)


def _abbreviated(name: Sequence[str], text: str) -> bool:
    """Whether a word in capitals has the first letter of a name and the others in their order (FRA, UK)."""
    letters = "".join(name)
    for match in _WORD.finditer(text):
        word = match[0]
        if 2 <= len(word) <= 5 and word.isupper() and word.lower() != letters:
            rest = iter(letters)
            if word[0].lower() == letters[:1] and all(letter in rest for letter in word.lower()):
                return True
    return False
