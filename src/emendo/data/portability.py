"""What follows from an edit of a built-in fact: the reversed relation, further facts of the answer, other names.

Edit *the capital of France is Oslo* (made up): then Oslo is the capital of France (reversed), the capital of the
country whose currency is ... (one hop), and France may be named by its code (alias). The facts that a chain goes on
with are true ones of the atlas, and only chains whose answer the edit changes are asked. Everything is a fixed function
of the atlas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from emendo.data import atlas
from emendo.data.schema import Consequence, Record

REVERSED = {
    "country_capital": "capital_country",
    "capital_country": "country_capital",
    "element_symbol": "symbol_element",
    "symbol_element": "element_symbol",
    "element_number": "number_element",
    "number_element": "element_number",
}
"""Relations of one to one, and what turns them round."""

NAMED = {
    "country_capital": "the capital of {s}",
    "capital_country": "the country whose capital is {s}",
    "country_currency": "the official currency of {s}",
    "currency_country": "the country whose currency is the {s}",
    "country_language": "the official language of {s}",
    "city_country": "the country in which {s} lies",
    "region_country": "the country to which the region {s} belongs",
    "us_city_state": "the US state in which {s} lies",
    "county_state": "the US state in which {s} lies",
    "state_capital": "the capital of the US state of {s}",
    "airport_city": "the city served by {s}",
    "code_city": "the city served by the airport with the IATA code {s}",
    "symbol_element": "the chemical element with the symbol {s}",
    "number_element": "the chemical element with atomic number {s}",
}
"""How an object is named by its subject, for the relations whose objects are subjects of others."""

ALIASES = {"country": "country_alpha3", "state": "state_abbreviation", "element": "element_symbol"}
"""The first word of a relation whose subjects have another name, and the relation that gives it."""
_ALIAS = {"country": "the country with the ISO code {a}", "state": "{a}", "element": "the element {a}"}

EACH = 2
"""The most one-hop and two-hop questions of a record."""


@dataclass(frozen=True)
class _World:
    """The atlas by subject and by object."""

    prompts: dict[str, tuple[str, ...]]
    subjects: dict[tuple[str, str], atlas.Fact]  # (relation, key of the subject)
    objects: dict[str, list[atlas.Fact]]  # key of the object
    about: dict[str, list[atlas.Fact]]  # key of the subject
    ids: dict[str, atlas.Fact]


def with_consequences(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records of the atlas with what follows from their edits; other records as they are.

    Args:
        records: from :func:`emendo.data.atlas.load`.
    """
    world = _read()
    found = []
    for record in records:
        fact = world.ids.get(record.id or "")
        if fact is not None:
            record = replace(record, consequences=tuple(_unlike(consequences(fact, record.target, world))))
        found.append(record)
    return tuple(found)


def consequences(fact: atlas.Fact, target: str, world: _World) -> Iterator[Consequence]:
    """What follows when a fact's object becomes the target.

    Args:
        fact: the fact as it was.
        target: its new object.
        world: the other facts.
    """
    first = world.prompts[fact.relation][0]
    if (back := REVERSED.get(fact.relation)) is not None:
        yield Consequence(
            "reversed", _render(world.prompts[back][0], target), fact.subject.removeprefix("the ")
        )
    kind = fact.relation.partition("_")[0]
    other = world.subjects.get((ALIASES.get(kind, ""), atlas.subject_key(fact.subject)))
    if other is not None and ALIASES[kind] != fact.relation and target not in other.object:
        name = _ALIAS[kind].format(a=other.object)
        yield Consequence("alias", _render(first, name), target)
    yield from _some(_forward(fact, target, world), "one_hop", fact)
    yield from _some(_backward(fact, target, world), "one_hop", fact)
    yield from _some(_twice(fact, target, world), "two_hop", fact)


_Asked = tuple[str, str]


def _forward(fact: atlas.Fact, target: str, world: _World) -> Iterator[_Asked]:
    """Facts of the new object, named by the edited subject."""
    if fact.relation not in NAMED:
        return
    name = NAMED[fact.relation].format(s=fact.subject)
    old = {f.relation: f.object for f in world.about.get(atlas.subject_key(fact.object), ())}
    for step in world.about.get(atlas.subject_key(target), ()):
        if old.get(step.relation) not in (None, step.object) and REVERSED.get(fact.relation) != step.relation:
            yield _render(world.prompts[step.relation][0], name), step.object


def _backward(fact: atlas.Fact, target: str, world: _World) -> Iterator[_Asked]:
    """The edited fact, its subject named by another fact."""
    for step in world.objects.get(atlas.subject_key(fact.subject), ()):
        if (
            step.relation in NAMED
            and step.relation != REVERSED.get(fact.relation)
            and step.subject != fact.object
        ):
            name = NAMED[step.relation].format(s=step.subject)
            yield _render(world.prompts[fact.relation][0], name), target


def _twice(fact: atlas.Fact, target: str, world: _World) -> Iterator[_Asked]:
    """Facts of the new object, named by the edited subject, that in turn is named by another fact."""
    for step in world.objects.get(atlas.subject_key(fact.subject), ()):
        if (
            step.relation in NAMED
            and step.relation != REVERSED.get(fact.relation)
            and step.subject != fact.object
        ):
            name = NAMED[step.relation].format(s=step.subject)
            yield from _forward(replace(fact, subject=name), target, world)


def _some(asked: Iterable[_Asked], kind: str, fact: atlas.Fact) -> Iterator[Consequence]:
    """A few questions, chosen by their digest, none of which gives its answer away."""
    fair = {(prompt, answer) for prompt, answer in asked if answer.casefold() not in prompt.casefold()}
    chosen = sorted(
        fair, key=lambda item: hashlib.sha256("\x1f".join((fact.relation, *item)).encode()).digest()
    )
    for prompt, answer in chosen[:EACH]:
        yield Consequence(kind, prompt, answer)  # type: ignore[arg-type]


def _render(template: str, name: str) -> str:
    """A prompt about something that may be described in words of its own."""
    for article in ("the US state of ", "the language ", "the ", "The "):
        if name.startswith("the "):
            template = template.replace(article + "{s}", "{s}")
    return atlas.render(template, name)


def _unlike(found: Iterable[Consequence]) -> Sequence[Consequence]:
    return list({one.prompt: one for one in found}.values())


def _read() -> _World:
    facts = atlas.read_atlas()
    world = _World(facts.prompts, {}, {}, {}, {})
    for fact in facts.facts:
        key = atlas.subject_key(fact.subject)
        world.subjects[fact.relation, key] = fact
        world.about.setdefault(key, []).append(fact)
        world.objects.setdefault(atlas.subject_key(fact.object), []).append(fact)
        world.ids[f"{fact.relation}/{fact.subject}"] = fact
    return world
