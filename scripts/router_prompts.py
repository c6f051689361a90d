"""The prompts that the router is trained on: facts in several forms, with the subject's name and the relation.

CounterFact's training file, ParaRel and the built-in facts. CounterFact does not name its relations: prompts with one
wording, or that are paraphrases of each other, have the same.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emendo.data import read_records
from emendo.data.atlas import read_atlas, render, split_of, subject_key
from emendo.data.portability import with_consequences

SEED = 0
NOISE_SHARE = 0.3
"""Share of the queries that have a sentence in front."""
KINDS = ("edit", "query", "other", "near")
"""The prompts of a fact."""
TYPED_TOGETHER = 15
"""Subjects that two relations must share for the subjects of one to be asked for the other."""
SAME = {
    "country_capital": "P36",
    "state_capital": "P36",
    "capital_country": "P1376",
    "country_language": "P37",
    "country_continent": "P30",
    "city_continent": "P30",
    "city_country": "P17",
    "region_country": "P17",
    "us_city_state": "P131",
    "county_state": "P131",
}
"""Relations of the built-in facts that ParaRel has, too."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact as four prompts.

    Attributes:
        subject: number of the subject.
        relation: number of the relation.
        name: of the subject.
        edit: the prompt that it is edited by.
        query: another form of it.
        other: a prompt about the same subject with another relation; its number is ``other_relation``.
        near: a prompt of the same relation about another subject, whose number is ``near_subject``.
    """

    subject: int
    relation: int
    name: str
    edit: str
    query: str
    other: str
    other_relation: int
    near: str
    near_subject: int

    def labels(self, kind: str) -> tuple[int, int]:
        """The numbers of subject and relation of one of its prompts."""
        return (
            self.near_subject if kind == "near" else self.subject,
            self.other_relation if kind == "other" else self.relation,
        )


class _Groups:
    """Wordings that belong together (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, item: str) -> str:
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, one: str, other: str) -> None:
        self.parent[self.find(one)] = self.find(other)


def counterfact_relations(
    raw: Sequence[dict[str, str]], pararel: Sequence[dict]
) -> tuple[_Groups, dict[str, list[str]]]:
    """Group the wordings of CounterFact; returns the groups and, by group, its frequent wordings with "{}"."""
    groups = _Groups()
    for relation in pararel:
        for pattern in statements(relation):
            if pattern not in groups.parent:  # some stand under several relations
                groups.join(pattern, relation["relation"])
    counts: Counter[str] = Counter()
    for record in raw:
        for field in ("prompt", "rephrase_prompt"):
            counts[wording_of(record, field)] += 1
    pairs = Counter((wording_of(record, "prompt"), wording_of(record, "rephrase_prompt")) for record in raw)
    best: dict[str, tuple[int, str]] = {}  # a wording goes with the known one that it is seen with most
    for (one, two), count in pairs.items():
        for new, old in ((one, two), (two, one)):
            if new not in groups.parent and old in groups.parent and count > best.get(new, (2, ""))[0]:
                best[new] = count, old
    for new, (_, old) in best.items():
        groups.join(new, old)
    forms = defaultdict(list)
    for wording, count in counts.items():
        if count > 2 and "{}" in wording:
            forms[groups.find(wording)].append(wording)
    return groups, forms


def wording_of(record: dict[str, str], field: str) -> str:
    """A prompt of CounterFact with "{}" for the subject, without sentences that stand in front."""
    wording = record[field].replace(record["subject"], "{}")
    last = wording.rpartition(". ")[2]
    return last if "{}" in last else wording


def statements(relation: dict) -> list[str]:
    """The patterns of a relation of ParaRel that end with the object, with "{}" for the subject."""
    ended = (pattern.rstrip(" .") for pattern in relation["patterns"])
    return [pattern[:-3].rstrip().replace("[X]", "{}") for pattern in ended if pattern.endswith("[Y]")]


def make_facts(data: Path, sentences: Sequence[str], counts: dict[str, int]) -> list[Fact]:
    """Make the facts in a fixed shuffled order.

    Args:
        data: the folder with ``counterfact-train.json``, ``counterfact-dev.json`` and ``pararel.jsonl``.
        sentences: unrelated sentences to stand before queries.
        counts: by source (``counterfact``, ``pararel``, ``atlas``), the number of facts.
    """
    rng, world = random.Random(SEED), _World(data)
    rng.shuffle(world.true)
    left, found = dict(counts), []
    for source, subject, relation in world.true:
        if left[source] and (fact := world.fact(source, subject, relation, sentences, rng)) is not None:
            left[source] -= 1
            found.append(fact)
    return found


class _World:
    """All facts, by subject and relation, and the wordings of each relation.

    Args:
        data: the folder of :func:`make_facts`.

    Attributes:
        true: source, subject and relation of each fact.
    """

    def __init__(self, data: Path) -> None:
        self.held_out = {subject_key(r.subject or "") for r in read_records(data / "counterfact-dev.json")}
        raw = json.loads((data / "counterfact-train.json").read_text())
        self.raw = [record for record in raw if subject_key(record["subject"]) not in self.held_out]
        self.pararel = [json.loads(line) for line in (data / "pararel.jsonl").read_text().splitlines()]
        self.groups, self.forms = counterfact_relations(self.raw, self.pararel)
        self.wordings: dict[str, list[str]] = {}
        self.about: dict[str, set[str]] = defaultdict(set)  # subject -> relations that make sense for it
        self.subjects: dict[str, list[str]] = defaultdict(list)  # relation -> its subjects
        self.true: list[tuple[str, str, str]] = []
        self.given: dict[tuple[str, str], dict[str, str]] = {}
        self.numbers: dict[str, int] = {}
        self._read_pararel()
        self._read_atlas()
        self._read_counterfact()
        self.fitting = self._fitting()
        self.aliases = self._aliases()
        self.sharing = _by_word(self.subjects)

    def _add(self, source: str, subject: str, relation: str) -> None:
        self.about[subject].add(relation)
        self.subjects[relation].append(subject)
        self.true.append((source, subject, relation))

    def _read_pararel(self) -> None:
        questions = tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))
        for relation in self.pararel:
            name = self.groups.find(relation["relation"])
            asked = [one.replace("[X]", "{}") for one in questions.get(relation["relation"], ())]
            known = [*self.wordings.get(name, ()), *statements(relation), *asked, *self.forms.get(name, ())]
            self.wordings[name] = list(dict.fromkeys(known))
            for subject, _ in relation["facts"]:
                if subject_key(subject) not in self.held_out:
                    self._add("pararel", subject, name)
        for name, own in self.forms.items():
            self.wordings.setdefault(name, own)

    def _read_atlas(self) -> None:
        atlas = read_atlas()
        for fact in atlas.facts:
            if split_of(fact.subject) == "train" and subject_key(fact.subject) not in self.held_out:
                name = self.relation_of(fact.relation)
                own = [prompt.replace("{s}", "{}") for prompt in atlas.prompts[fact.relation]]
                self.wordings[name] = list(dict.fromkeys([*self.wordings.get(name, ()), *own]))
                self._add("atlas", fact.subject, name)

    def _read_counterfact(self) -> None:
        for record in self.raw:
            name = self.groups.find(wording_of(record, "prompt"))
            if len(self.wordings.get(name, ())) > 1:
                self._add("counterfact", record["subject"], name)
                self.given[record["subject"], name] = record

    def _fitting(self) -> dict[str, list[str]]:
        """The relations that the subjects of each relation may be asked for, too."""
        together: Counter[tuple[str, str]] = Counter()
        for own in self.about.values():
            together.update((one, two) for one in own for two in own if one != two)
        fitting = defaultdict(list)
        for (one, two), count in together.items():
            if count >= TYPED_TOGETHER and len(self.wordings[two]) > 1:
                fitting[one].append(two)
        return fitting

    def _aliases(self) -> dict[tuple[str | None, str], str]:
        """A prompt with another name of the subject, by subject and relation."""
        found: dict[tuple[str | None, str], str] = {}
        for record in with_consequences(read_records("atlas", split="train").records):
            for one in record.consequences:
                if one.kind == "alias":
                    found.setdefault((record.subject, self.relation_of(record.relation or "")), one.prompt)
        return found

    def relation_of(self, name: str) -> str:
        """The relation of built-in facts, by the name that it has here."""
        return self.groups.find(SAME.get(name, f"atlas:{name}"))

    def number(self, key: str) -> int:
        """The number of a subject or relation."""
        return self.numbers.setdefault(key, len(self.numbers))

    def fact(
        self, source: str, subject: str, relation: str, sentences: Sequence[str], rng: random.Random
    ) -> Fact | None:
        """Choose the four prompts of a fact; None where there are too few wordings or subjects."""
        wordings = self.wordings
        others = (*(self.about[subject] - {relation}), *self.fitting[relation])
        others = sorted(one for one in others if len(wordings[one]) > 1)
        if not others or len(wordings[relation]) < 2 or len(set(self.subjects[relation])) < 3:
            return None
        record = self.given.get((subject, relation)) if source == "counterfact" else None
        one, two = rng.sample(wordings[relation], 2)
        edit, query = fill(one, subject), fill(two, subject)
        alias = self.aliases.get((subject.removeprefix("the "), relation))
        if record is not None and rng.random() < 0.7:
            edit, query = record["prompt"], record["rephrase_prompt"]
        elif alias and rng.random() < 0.4:
            query = alias
        elif rng.random() < NOISE_SHARE:
            query = f"{rng.choice(sentences)} {query}"
        other_relation = rng.choice(others)
        near_subject = _near(subject, relation, self.subjects, self.sharing, rng)
        near = fill(rng.choice(wordings[relation]), near_subject)
        if record is not None and rng.random() < 0.5:
            near = near_subject = record["locality_prompt"]  # which does not name its subject
        other = fill(rng.choice(wordings[other_relation]), subject)
        if rng.random() < NOISE_SHARE / 2:
            other = f"{rng.choice(sentences)} {other}"
        return Fact(
            subject=self.number(f"s:{subject_key(subject)}"),
            relation=self.number(f"r:{relation}"),
            name=subject.removeprefix("the "),
            edit=edit,
            query=query,
            other=other,
            other_relation=self.number(f"r:{other_relation}"),
            near=near,
            near_subject=self.number(f"s:{subject_key(near_subject)}"),
        )


def fill(wording: str, subject: str) -> str:
    """A wording with a subject, which may bring its own article."""
    if subject.startswith("the "):
        wording = wording.replace("the {}", "{}").replace("The {}", "{}")
    return render(wording.replace("{}", "{s}"), subject)


def _by_word(subjects: dict[str, list[str]]) -> dict[tuple[str, str], list[str]]:
    found = defaultdict(list)
    for name, own in subjects.items():
        for subject in set(own):
            for word in subject.split():
                found[name, word].append(subject)
    return found


def _near(subject: str, name: str, subjects: dict, sharing: dict, rng: random.Random) -> str:
    """Another subject of the relation; in half of the cases one whose name has a word in common."""
    alike = [one for word in subject.split() for one in sharing[name, word][:30] if one != subject]
    if alike and rng.random() < 0.5:
        return rng.choice(alike)
    while (one := rng.choice(subjects[name])) == subject:
        pass
    return one
