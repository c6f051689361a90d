"""The built-in facts ("atlas") as counterfactual edits.

`atlas.json.gz` holds true facts (subject, object) by relation, `atlas_templates.toml` their wording;
`docs/atlas.md` says where they come from. Everything here is a fixed function of those two files: the
split and every choice follow from SHA-256 of the names, so all machines see the same records.
"""

import gzip
import hashlib
import json
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TypeVar

from emendo.data.schema import Probe, Record
from emendo.errors import DataError

SPLITS = ("train", "validation", "test")
_Item = TypeVar("_Item")
_PROBES = 4  # neighbours of a record, and unrelated prompts


@dataclass(frozen=True, slots=True)
class Fact:
    """A true statement: `relation` of `subject` is `object`; the subject reads well inside a sentence."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True, slots=True)
class Atlas:
    """All facts in their fixed shuffled order, and the prompts of each relation."""

    facts: tuple[Fact, ...]
    prompts: dict[str, tuple[str, ...]]
    sources: dict[str, str]  # package -> version


def load(split: str | None = None, limit: int | None = None) -> tuple[Record, ...]:
    """The records of a split (None: of all three, split by split), at most `limit` of them.

    A record's neighbours and unrelated prompts come from its own split. The order is a fixed shuffle, so
    the first records of a split mix the relations.

    Raises:
        DataError: `split` is not "train", "validation", "test" or None.
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


def read_atlas() -> Atlas:
    """The facts and prompts, as they lie in the package."""
    folder = resources.files("emendo.data")
    packed = json.loads(gzip.decompress((folder / "atlas.json.gz").read_bytes()))
    wording = tomllib.loads((folder / "atlas_templates.toml").read_text(encoding="utf-8"))
    facts = [Fact(name, *pair) for name, pairs in packed["relations"].items() for pair in pairs]
    facts.sort(key=lambda fact: _digest(fact.relation, fact.subject))
    prompts = {name: tuple(wording[name]["prompts"]) for name in packed["relations"]}
    return Atlas(tuple(facts), prompts, packed["sources"])


def subject_key(subject: str) -> str:
    """What two spellings of one name have in common: no accents, no capitals, no leading "the"."""
    plain = unicodedata.normalize("NFKD", subject)
    plain = "".join(char for char in plain if not unicodedata.combining(char)).casefold().strip()
    return plain.removeprefix("the ")


def split_of(subject: str) -> str:
    """The split of every fact about a subject: 80% train, 10% validation, 10% test."""
    place = int.from_bytes(_digest("split", subject_key(subject))[:8], "big") % 10
    return SPLITS[0] if place < 8 else SPLITS[place - 7]


def render(template: str, subject: str) -> str:
    """A prompt about a subject, with a capital at its start."""
    text = template.replace("{s}", subject)
    return text[0].upper() + text[1:]


def _record(
    fact: Fact,
    atlas: Atlas,
    pool: list[Fact],
    by_relation: dict[str, list[Fact]],
    objects: dict[str, tuple[str, ...]],
) -> Record:
    digest = _digest("record", fact.relation, fact.subject)
    start = int.from_bytes(digest[:8], "big")
    target = next(other for other in _from(objects[fact.relation], start) if not _alike(other, fact.object))
    names = {fact.subject, fact.object, target}
    neighbours = (
        other
        for other in _from(by_relation[fact.relation], start)
        if other.subject != fact.subject and not _alike(other.object, target)
    )
    unrelated = (
        other
        for other in _from(pool, int.from_bytes(digest[8:16], "big"))
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
        neighbours=_probes(atlas, neighbours, digest[16:]),
        unrelated=_probes(atlas, unrelated, digest[16 + _PROBES :]),
        answer=fact.object,
    )


def _probes(atlas: Atlas, facts: Iterator[Fact], choices: bytes) -> tuple[Probe, ...]:
    """The first facts as probes: half in the relation's first wording, half in any wording."""
    probes = []
    for i, fact in zip(range(_PROBES), facts, strict=False):
        prompts = atlas.prompts[fact.relation]
        template = prompts[0] if i < _PROBES // 2 else prompts[choices[i] % len(prompts)]
        probes.append(Probe(render(template, fact.subject), fact.object))
    return tuple(probes)


def _alike(one: str, other: str) -> bool:
    """Whether one answer begins with the other, so that a model's answer could not tell them apart."""
    return one.startswith(other) or other.startswith(one)


def _from(items: Sequence[_Item], start: int) -> Iterator[_Item]:
    """All items, from one place on and around."""
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


def _digest(*names: str) -> bytes:
    return hashlib.sha256("\x1f".join(names).encode()).digest()
