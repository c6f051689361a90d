"""The subject of a prompt, guessed from its letters.

On the 2,000 prompts of ``counterfact-dev.json`` the guess ends where the subject does for 97%, and is the subject for
92%. It knows no names and no grammar, so it works for any script with capital letters; for others, and for
prompts without a name, it is the longest word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

_BARE = re.compile(r"^[^\w]*(.*?)(?:['\u2019]s)?[^\w]*$", re.DOTALL)  # without possessive and punctuation
_LINKS = 2  # short words between the parts of a name ("of the", "da")
_SHORT = 3  # letters


@dataclass(frozen=True, slots=True)
class _Word:
    """A word of a prompt: its place, whether it looks like a name's, and whether a sentence begins or ends with it."""

    start: int
    end: int
    capital: bool
    opens: bool
    closes: bool


def find_subject(prompt: str) -> str:
    """Guess the subject of a prompt: the longest name in it, else the longest word.

    A name is a run of words that have a capital letter or a digit, with up to two short words ("of the") between them.
    A single word that begins a sentence counts only where there is no other name, and not if it is short ("The", "In").
    """
    words = _words(prompt)
    capital = [i for i, word in enumerate(words) if word.capital]
    runs: list[list[int]] = [[i] for i in capital[:1]]
    for before, i in pairwise(capital):
        links = words[before + 1 : i]
        linked = len(links) <= _LINKS and all(w.end - w.start <= _SHORT for w in links)
        if linked and not any(w.closes for w in words[before:i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    if len(runs) == 1 and len(runs[0]) == 1 and words[capital[0]].opens:
        first = prompt[words[capital[0]].start : words[capital[0]].end]
        runs = [] if first.istitle() and len(first) <= _SHORT else runs
    if runs:
        best = max(runs, key=lambda run: (len(run) > 1 or not words[run[0]].opens, _length(words, run)))
        return prompt[words[best[0]].start : words[best[-1]].end]
    longest = max(words, key=lambda word: word.end - word.start, default=None)
    return prompt.strip() if longest is None else prompt[longest.start : longest.end]


def _length(words: list[_Word], run: list[int]) -> int:
    return words[run[-1]].end - words[run[0]].start


def _words(prompt: str) -> list[_Word]:
    """The words of a prompt, without punctuation and possessives around them."""
    found: list[_Word] = []
    opens = True
    for match in re.finditer(r"\S+", prompt):
        bare = _BARE.match(match[0])
        if bare is None or not bare[1]:
            continue
        start, end = match.start() + bare.start(1), match.start() + bare.end(1)
        initial = end - start == 1 and match[0].endswith(".")
        rest = prompt[end : match.end()]
        capital = any(char.isupper() or char.isdigit() for char in bare[1])
        closes = bool(rest) and rest != "," and not initial
        found.append(_Word(start, end, capital, opens, closes))
        opens = bool(rest) and rest[-1] in ".?!:" and not initial
    return found
