"""Questions that test a model apart from any edited fact: knowledge, grammar and arithmetic.

All of them are made here, by fixed rules from the built-in facts and a few words, so that they need no network and are
the same on all machines. Nothing is drawn at random: choices follow from SHA-256 of the questions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

from emendo.data import atlas
from emendo.data.schema import Record

OPENINGS = (
    "The old man walked slowly down to the harbour, and",
    "In order to bake a good loaf of bread, you should first",
    "The history of the railway begins with",
    "My sister called me last night because she",
)
"""Openings of texts, for long continuations."""

PASSAGES = (
    (
        "The rain had stopped before dawn, and when the children came out of the house the garden was "
        "full of small pools. They ran from one to the next, laughing, until their mother called them in "
        "for breakfast. Nobody minded the wet shoes that morning, for it was the first day of the "
        "holidays and the train would not leave before noon."
    ),
    (
        "A bridge must carry its own weight as well as everything that crosses it. Engineers therefore "
        "begin with the heaviest load that they expect, add a margin for wind and for what nobody has "
        "thought of, and only then choose the shape. Stone is strong when it is pressed together and weak"
        " when it is pulled apart, which is why old bridges are made of arches."
    ),
    (
        "To make the soup, cut two onions into thin slices and cook them gently in butter until they are "
        "soft and brown. Add a spoon of flour, stir, and pour in the hot stock a little at a time. Let it"
        " simmer for half an hour, taste it, and serve it with bread and plenty of cheese on top."
    ),
    (
        "The committee met on Tuesday to discuss the budget for the coming year. Several members said "
        "that the library needed a new roof, while others thought that the money would be better spent on"
        " the school. After two hours they agreed to ask an expert what the repair would cost, and to "
        "decide in the spring."
    ),
    (
        "Bees find their way by the position of the sun, and they can tell each other where flowers are. "
        "A bee that has found food returns to the hive and dances: the direction of the dance shows the "
        "way, and its length shows how far the others have to fly. Even on a cloudy day they know where "
        "the sun is."
    ),
    (
        "He had read the letter three times and still did not know what to answer. His brother wrote that"
        " the farm was to be sold, that the buyers were decent people, and that everything had been "
        "arranged. There was nothing to sign. But between the lines there was something else, and it kept"
        " him awake for most of the night."
    ),
)
"""Running text, written for this purpose."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with several options.

    Attributes:
        family: ``"knowledge"``, ``"grammar"`` or ``"arithmetic"``.
        prompt: the text to continue.
        options: possible continuations.
        right: index of the correct option.
    """

    family: str
    prompt: str
    options: tuple[str, ...]
    right: int


def abilities(records: Sequence[Record] = (), each: int = 40) -> tuple[Choice, ...]:
    """Questions of every family.

    Args:
        records: the edits; no knowledge question is about their relations, or names their subjects or answers.
        each: the number of questions of a family.
    """
    return (*knowledge(records, each), *grammar(each), *arithmetic(each))


def knowledge(records: Sequence[Record], count: int) -> tuple[Choice, ...]:
    """Facts of the atlas, each with three other objects of its relation.

    Args:
        records: the edits; see :func:`abilities`.
        count: the largest number of questions.
    """
    facts = atlas.read_atlas()
    relations = {record.relation for record in records}
    names = {name for r in records for name in (r.subject, r.target, r.answer) if name}
    by_relation: dict[str, list[atlas.Fact]] = {}
    for fact in facts.facts:
        if fact.relation not in relations:
            by_relation.setdefault(fact.relation, []).append(fact)
    found: list[Choice] = []
    columns = [_free(group, names) for group in by_relation.values()]
    for place in range(max(map(len, columns), default=0)):  # in turn, so that the relations are mixed
        for column in columns:
            if place < len(column) and len(found) < count:
                fact = column[place]
                others = [
                    f.object for f in by_relation[fact.relation] if not atlas.alike(f.object, fact.object)
                ]
                prompt = atlas.render(facts.prompts[fact.relation][0], fact.subject)
                found += _choice("knowledge", prompt, fact.object, others, 3)
    return tuple(found)


def grammar(count: int) -> tuple[Choice, ...]:
    """Agreement in number, with a noun of the other number in between; a choice of two words each.

    Args:
        count: the largest number of questions.
    """
    nouns = {"key": "keys", "picture": "pictures", "letter": "letters", "child": "children", "road": "roads"}
    places = {"table": "tables", "house": "houses", "river": "rivers", "woman": "women"}
    items: list[tuple[str, str, str]] = []
    for (one, many), (near, far) in product(nouns.items(), places.items()):
        items += [
            (f"The {one} near the {far}", "is", "are"),
            (f"The {many} near the {near}", "are", "is"),
            (f"The {one} that the {far} have seen", "was", "were"),
            (f"The {many} that the {near} has seen", "were", "was"),
            ("We looked at these", many, one),
            ("We looked at a single", one, many),
        ]
    chosen = sorted(dict.fromkeys(items), key=lambda item: atlas.digest(*item))[:count]
    return tuple(c for prompt, right, wrong in chosen for c in _choice("grammar", prompt, right, [wrong], 1))


def arithmetic(count: int) -> tuple[Choice, ...]:
    """Sums, differences and products of small numbers, each with three wrong results nearby.

    Args:
        count: the largest number of questions.
    """
    items = [(f"{a} + {b} =", a + b) for a, b in product(range(1, 10), repeat=2)]
    items += [(f"{a + b} - {b} =", a) for a, b in product(range(1, 10), repeat=2)]
    items += [(f"{a} * {b} =", a * b) for a, b in product(range(2, 10), repeat=2)]
    chosen = sorted(items, key=lambda item: atlas.digest(item[0]))[:count]
    found: list[Choice] = []
    for prompt, result in chosen:
        wrong = [str(result + step) for step in (1, -1, 2, -2, 10) if result + step >= 0]
        found += _choice("arithmetic", prompt, str(result), wrong, 3)
    return tuple(found)


def _free(facts: Sequence[atlas.Fact], names: Collection[str]) -> list[atlas.Fact]:
    """The facts whose subject and object are not among these names."""
    return [
        f
        for f in facts
        if f.subject not in names and f.subject.removeprefix("the ") not in names and f.object not in names
    ]


def _choice(family: str, prompt: str, right: str, others: Sequence[str], wrong: int) -> list[Choice]:
    """The question with ``wrong`` other options, in a list; an empty list where there are too few."""
    pool = sorted(dict.fromkeys(others), key=lambda other: atlas.digest(prompt, other))[:wrong]
    if len(pool) < wrong:
        return []
    place = atlas.digest(family, prompt)[0] % (wrong + 1)
    return [Choice(family, prompt, (*pool[:place], right, *pool[place:]), place)]
