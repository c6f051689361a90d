"""Prompts that name the subject of a fact, and ask for no fact that is edited; the router's judge is fitted on them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from emendo._subject import find_subject
from router_prompts import Fact

REMARKS = (
    "I had heard of {} before.",
    "Thanks, {} is good to know.",
    "Good to hear about {}, I will remember it.",
    "Is {} really that important?",
    "My sister likes {} very much.",
    "Write a short story about {}.",
    "Summarise what you said about {} in one sentence.",
    "We talked about {} at school.",
    "Say something nice about {}.",
    "What do you think of {}?",
    "I would rather not discuss {} today.",
    "Do you like {}?",
    "Tell me more about {}.",
    "That is all about {}, thank you.",
    "They never mentioned {} to me.",
    "Okay, I will tell my friends about {}.",
)
LENGTHS = (15, 30, 60, 120, 200)  # words


def with_longer_names(facts: Sequence[Fact], seed: int = 5) -> list[str]:
    """The prompt of each fact that names its subject, with words of other names beside the name."""
    rng = random.Random(seed)
    words = [fact.name.split() for fact in facts]
    first = [own[0] for own in words if own[0][:1].isupper()]
    last = [own[-1] for own in words if own[-1][:1].isupper()]

    def longer(name: str) -> str:
        before, after = rng.choice(first), rng.choice(last)
        end = rng.choice(("II", "Jr", "River", "Park", "County", "Street"))
        forms = (
            f"{before} {name}",
            f"{name} {after}",
            f"{before} {name} {after}",
            f"{before}-{name}",
            f"New {name}",
            f"{name} {end}",
        )
        return rng.choice(forms)

    return [
        fact.edit.replace(fact.name, longer(fact.name))
        for fact in facts
        if fact.name and fact.name in fact.edit
    ]


def remarks(facts: Sequence[Fact], seed: int = 6) -> list[str]:
    """What one says of a subject, or asks about it in a chat, that asks for no fact."""
    rng = random.Random(seed)
    return [rng.choice(REMARKS).format(fact.name) for fact in facts]


def passages_about(facts: Sequence[Fact], passages: Sequence[str], seed: int = 1) -> list[str]:
    """A passage for each fact, with its subject in the place of the passage's own."""
    rng, found = random.Random(seed), []
    for fact in facts:
        text = rng.choice(passages)
        name = find_subject(text)
        text = text.replace(name, fact.name) if name else f"{fact.name} {text}"
        found.append(" ".join(text.split()[: rng.choice(LENGTHS)]))
    return found
