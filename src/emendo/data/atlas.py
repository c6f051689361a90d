"""The built-in facts ("atlas") as counterfactual edits.

``atlas.json.gz`` holds true facts (subject, object) by relation, ``atlas_templates.toml`` the prompts of each relation;
``docs/atlas.md`` names the sources. Everything here is a fixed function of those two files: the split and every choice
follow from SHA-256 of the names, so that all machines get the same records.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import TypeVar

from emendo.data.schema import Probe, Record
from emendo.errors import DataError

SPLITS = ("train", "validation", "test")
_Item = TypeVar("_Item")
_PROBES = 4  # neighbours of a record, and unrelated prompts


@dataclass(frozen=True, slots=True)
class Fact:
    """A true fact: the object is the ``relation`` of the subject, which is written as inside a sentence."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True, slots=True)
class Atlas:
    """All facts in their fixed shuffled order, and the prompts of each relation."""

    facts: tuple[Fact, ...]
    prompts: dict[str, tuple[str, ...]]
    sources: dict[str, str]  # package -> version


@cache
def load(split: str | None = None, limit: int | None = None) -> tuple[Record, ...]:
    """Make records of the facts.

    The neighbours and unrelated prompts of a record come from its own split. The order is a fixed shuffle, so the first
    records of a split mix the relations.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; None takes all three, one after the other.
        limit: the largest number of records.

    Raises:
        DataError: there is no such split.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"the atlas has no split {split!r}; choose one of {', '.join(SPLITS)}")
    atlas = read_atlas()
    objects = _objects_by_relation(atlas.facts)
    records: list[Record] = []
    for name in SPLITS if split is None else (split,):
        facts = [fact for fact in atlas.facts if split_of(fact.subject) == name]
        build = partial(_record, atlas=atlas, pool=facts, by_relation=_by_relation(facts), objects=objects)
        left = None if limit is None else limit - len(records)
        records += [build(fact) for fact in facts[:left]]
    return tuple(records)


@cache
def read_atlas() -> Atlas:
    """Read the facts and prompts from the package."""
    folder = resources.files("emendo.data")
    packed = json.loads(gzip.decompress((folder / "atlas.json.gz").read_bytes()))
    wording = tomllib.loads((folder / "atlas_templates.toml").read_text(encoding="utf-8"))
    facts = [Fact(name, *pair) for name, pairs in packed["relations"].items() for pair in pairs]
    facts.sort(key=lambda fact: digest(fact.relation, fact.subject))
    prompts = {name: tuple(wording[name]["prompts"]) for name in packed["relations"]}
    return Atlas(tuple(facts), prompts, packed["sources"])


def subject_key(subject: str) -> str:
    """A name without accents, capitals and a leading "the", which all its spellings share."""
    plain = unicodedata.normalize("NFKD", subject)
    plain = "".join(char for char in plain if not unicodedata.combining(char)).casefold().strip()
    return plain.removeprefix("the ")


def split_of(subject: str) -> str:
    """The split of all facts about a subject: 80% train, 10% validation, 10% test."""
    place = int.from_bytes(digest("split", subject_key(subject))[:8], "big") % 10
    return SPLITS[0] if place < 8 else SPLITS[place - 7]


def render(template: str, subject: str) -> str:
    """Fill a template with a subject; the prompt starts with a capital."""
    text = template.replace("{s}", subject)
    return text[0].upper() + text[1:]


def _record(
    fact: Fact,
    atlas: Atlas,
    pool: list[Fact],
    by_relation: dict[str, list[Fact]],
    objects: dict[str, tuple[str, ...]],
) -> Record:
    choices = digest("record", fact.relation, fact.subject)
    start = int.from_bytes(choices[:8], "big")
    target = next(other for other in _around(objects[fact.relation], start) if not alike(other, fact.object))
    names = {fact.subject, fact.object, target}
    neighbours = (
        other
        for other in _around(by_relation[fact.relation], start)
        if other.subject != fact.subject and not alike(other.object, target)
    )
    unrelated = (
        other
        for other in _around(pool, int.from_bytes(choices[8:16], "big"))
        if other.relation != fact.relation and names.isdisjoint((other.subject, other.object))
    )
    prompts = atlas.prompts[fact.relation]
    return Record(
        prompt=render(prompts[0], fact.subject),
        target=target,
        subject=fact.subject.removeprefix("the "),
        relation=fact.relation,
        id=f"{fact.relation}/{fact.subject}",
        paraphrases=tuple(render(prompt, fact.subject) for prompt in prompts[1:]),
        neighbours=_probes(atlas, neighbours, choices[16:]),
        unrelated=_probes(atlas, unrelated, choices[16 + _PROBES :]),
        answer=fact.object,
    )


def _probes(atlas: Atlas, facts: Iterator[Fact], choices: bytes) -> tuple[Probe, ...]:
    """The first facts as probes: half with the first prompt of the relation, half with any of its prompts."""
    probes = []
    for i, fact in zip(range(_PROBES), facts, strict=False):
        prompts = atlas.prompts[fact.relation]
        template = prompts[0] if i < _PROBES // 2 else prompts[choices[i] % len(prompts)]
        probes.append(Probe(render(template, fact.subject), fact.object))
    return tuple(probes)


def alike(one: str, other: str) -> bool:
    """Whether one answer begins with the other, so that the start of a continuation does not distinguish them."""
    return one.startswith(other) or other.startswith(one)


def _around(items: Sequence[_Item], start: int) -> Iterator[_Item]:
    """All items, starting at an index and wrapping around."""
    return (items[(start + i) % len(items)] for i in range(len(items)))


def _by_relation(facts: list[Fact]) -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.relation, []).append(fact)
    return groups


def _objects_by_relation(facts: tuple[Fact, ...]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, set[str]] = {}
    for fact in facts:
        groups.setdefault(fact.relation, set()).add(fact.object)
    return {relation: tuple(sorted(group)) for relation, group in groups.items()}


def digest(*names: str) -> bytes:
    """SHA-256 of several names."""
    return hashlib.sha256("\x1f".join(names).encode()).digest()
