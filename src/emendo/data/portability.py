"""Consequences of the edits of built-in facts: reversed relations, chains of facts, and other names of the subject.

After the edit *the capital of France is Oslo* (made up), Oslo is the capital of France (reversed), of the country whose
currency is ... (one hop), and of the country with the ISO code FRA (alias). The other facts of a chain are true ones of
the atlas, and only chains whose answer the edit changes become prompts. Everything is a fixed function of the atlas.
"""

from __future__ import annotations

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
"""One-to-one relations with their reverse."""

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
"""A description of an object by its subject, for relations whose objects are the subjects of others."""

ALIASES = {"country": "country_alpha3", "state": "state_abbreviation", "element": "element_symbol"}
"""By the first word of a relation: the relation that gives another name of its subjects."""
_ALIAS = {"country": "the country with the ISO code {a}", "state": "{a}", "element": "the element {a}"}

EACH = 2
"""The largest number of one-hop consequences of a record, and of two-hop ones."""


@dataclass(frozen=True)
class _World:
    """The atlas by subject and by object."""

    prompts: dict[str, tuple[str, ...]]
    subjects: dict[tuple[str, str], atlas.Fact]  # (relation, key of the subject)
    objects: dict[str, list[atlas.Fact]]  # key of the object
    about: dict[str, list[atlas.Fact]]  # key of the subject
    ids: dict[str, atlas.Fact]


def with_consequences(records: Iterable[Record]) -> tuple[Record, ...]:
    """Add the consequences of their edits to records of the atlas; other records are unchanged.

    Args:
        records: from :func:`emendo.data.atlas.load`.
    """
    world = _read()
    found = []
    for record in records:
        fact = world.ids.get(record.id or "")
        if fact is not None:
            record = replace(
                record, consequences=tuple(_without_repeats(consequences(fact, record.target, world)))
            )
        found.append(record)
    return tuple(found)


def consequences(fact: atlas.Fact, target: str, world: _World) -> Iterator[Consequence]:
    """The consequences of an edit that replaces the object of a fact by a target.

    Args:
        fact: the true fact.
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
    yield from _chosen(_forward(fact, target, world), "one_hop", fact)
    yield from _chosen(_backward(fact, target, world), "one_hop", fact)
    yield from _chosen(_twice(fact, target, world), "two_hop", fact)


_Question = tuple[str, str]
"""A prompt and its answer."""


def _forward(fact: atlas.Fact, target: str, world: _World) -> Iterator[_Question]:
    """Facts of the new object, which is described by the edited subject."""
    if fact.relation not in NAMED:
        return
    name = NAMED[fact.relation].format(s=fact.subject)
    old = {f.relation: f.object for f in world.about.get(atlas.subject_key(fact.object), ())}
    for step in world.about.get(atlas.subject_key(target), ()):
        if old.get(step.relation) not in (None, step.object) and REVERSED.get(fact.relation) != step.relation:
            yield _render(world.prompts[step.relation][0], name), step.object


def _backward(fact: atlas.Fact, target: str, world: _World) -> Iterator[_Question]:
    """The edited fact, whose subject is described by another fact."""
    for name in _descriptions(fact, world):
        yield _render(world.prompts[fact.relation][0], name), target


def _twice(fact: atlas.Fact, target: str, world: _World) -> Iterator[_Question]:
    """Facts of the new object, which is described by the edited subject, itself described by another fact."""
    for name in _descriptions(fact, world):
        yield from _forward(replace(fact, subject=name), target, world)


def _descriptions(fact: atlas.Fact, world: _World) -> Iterator[str]:
    """The subject of a fact, described by other facts of which it is the object."""
    for step in world.objects.get(atlas.subject_key(fact.subject), ()):
        named = step.relation in NAMED and step.relation != REVERSED.get(fact.relation)
        if named and step.subject != fact.object:
            yield NAMED[step.relation].format(s=step.subject)


def _chosen(questions: Iterable[_Question], kind: str, fact: atlas.Fact) -> Iterator[Consequence]:
    """A few questions, chosen by their digests, whose prompts do not contain their answers."""
    fair = {(prompt, answer) for prompt, answer in questions if answer.casefold() not in prompt.casefold()}
    chosen = sorted(fair, key=lambda item: atlas.digest(fact.relation, *item))
    for prompt, answer in chosen[:EACH]:
        yield Consequence(kind, prompt, answer)  # type: ignore[arg-type]


def _render(template: str, name: str) -> str:
    """Fill a template with a name or with a description that brings its own article."""
    for article in ("the US state of ", "the language ", "the ", "The "):
        if name.startswith("the "):
            template = template.replace(article + "{s}", "{s}")
    return atlas.render(template, name)


def _without_repeats(found: Iterable[Consequence]) -> Sequence[Consequence]:
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
