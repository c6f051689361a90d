"""Texts around a fact: contexts in which it holds, and other subjects, made without a model of its relation.

The contexts of a prompt are its own words among words that the model wrote itself. They replace the paraphrases that a
trained editor sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from emendo.data import atlas
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

_PASSAGES = 64  # of the model's own text
_NAMES = 200  # other subjects
_OTHERS = 8  # built-in names of other subjects for a prompt, and as many of the model's own words
_MARKS = ".,;:!?()[]{}\"'*-_"


class Surroundings:
    """The words and names around facts, the same for all edits of a model.

    A decoder writes the passages itself; for other models they are the built-in facts.

    Attributes:
        passages: running text.
        words: the words of each passage.
        capitals: the words in them that look like names.
        facts: prompts of built-in facts with their answers.
        names: their subjects.
    """

    def __init__(self, lm: LM) -> None:
        facts = atlas.load("train", _NAMES)
        self.facts = [(fact.prompt, str(fact.answer)) for fact in facts]
        own = lm.kind == "causal"
        self.passages = own_passages(lm, _PASSAGES) if own else [" ".join(fact) for fact in self.facts]
        self.words = [passage.split() or [passage] for passage in self.passages]
        self.capitals = capitals(self.words)
        self.names = [str(record.subject) for record in facts]


def fitting(lm: LM, prompt: str, request: Request) -> list[Text]:
    """A prompt with the target of a request; nothing where they exceed the model's context."""
    try:
        return to_texts(lm, [(prompt, request.target, request.separator)], closed=True)
    except RequestError:
        return []


def contexts(
    prompt: str, subject: str, count: int, words: Sequence[Sequence[str]], random: Random
) -> list[str]:
    """The prompt, followed by ``count`` texts that mention the subject and shall have the same answer.

    Args:
        prompt: of the edit.
        subject: a part of it.
        count: the number of contexts.
        words: passages of running text, each as its words.
        random: chooses.
    """
    before, _, after = prompt.rpartition(subject)
    found = [prompt]
    for index in range(count):
        passage = random.choice(words)
        at = random.randrange(len(passage))
        some = " ".join(passage[at : at + random.randint(2, 5)])
        rest = [" ".join(word for word in part.split() if random.random() < 0.5) for part in (before, after)]
        found.append(
            (
                f"{some}. {prompt}",
                f"{rest[0]} {subject} {rest[1]}".strip(),
                f"{subject} {some}",
                f"{some}. {subject}{after}",
            )[index % 4]
        )
    return found


def capitals(passages: Sequence[Sequence[str]]) -> list[str]:
    """The words in passages that begin with a capital letter although no sentence begins with them."""
    pairs = [pair for words in passages for pair in pairwise(words)]
    inside = [word.strip(_MARKS) for before, word in pairs if before[-1] not in ".?!:"]
    return [word for word in inside if len(word) > 2 and word.istitle()]


def made_names(subject: str, words: Sequence[str], count: int, random: Random) -> list[str]:
    """Names of as many words as the subject has, up to three."""
    length = min(3, len(subject.split()))
    return [" ".join(random.choice(words) for _ in range(length)) for _ in range(count)]


def other_names(subject: str, around: Surroundings, random: Random) -> list[str]:
    """Names of other subjects, each once: built-in ones in the first half, the model's own words in the second."""
    built_in = random.sample(around.names, _OTHERS)
    made = made_names(subject, around.capitals or around.names, _OTHERS, random)
    return [name for name in dict.fromkeys([*built_in, *made]) if name != subject]


def subject_end(lm: LM, text: Text, subject: str) -> int:
    """The place of the last token of the subject's last mention in a prompt; of the prompt, if it is not found."""
    prompt = text.ids[: text.start]
    said = lm.tokenizer.decode(prompt).count(subject)
    for end in range(len(prompt)):
        if said and lm.tokenizer.decode(prompt[: end + 1]).count(subject) == said:
            return end
    return len(prompt) - 1


def turn(items: Sequence[Text], at: int, count: int) -> list[Text]:
    """The items whose turn it is in a step or an epoch, each once."""
    count = min(count, len(items))
    return [items[(at * count + i) % len(items)] for i in range(count)]
