"""The built-in facts that the models of the zoo know, as questions and as claims with their probes.

A model trained here knows these facts and no others, so the probes of a record only ask for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice
from random import Random

from emendo.data import atlas
from emendo.data.schema import Probe, Record

FACTS = (1200, 300)
"""The numbers of training records and of test records, from the first on, that the models know."""

CLASSES = ("false", "true")
"""The classes of a claim, in the order of their numbers."""

_PROBES = 2  # neighbours of a record, and unrelated prompts


def known(split: str, facts: tuple[int, int] = FACTS) -> tuple[Record, ...]:
    """The records of "train" or "test" whose facts the models know, with the built-in probes."""
    return atlas.load(split, facts[("train", "test").index(split)])


def wordings(record: Record) -> tuple[str, ...]:
    """The prompts of a record; the last one is held out of the models' training."""
    return (record.prompt, *record.paraphrases)


def claims(record: Record, wording: int) -> tuple[str, str]:
    """The false and the true claim of a record in one of its wordings, as in `CLASSES`."""
    prompt = wordings(record)[wording]
    return f"{prompt} {record.target}.", f"{prompt} {record.answer}."


def with_known_probes(records: Sequence[Record], pool: Sequence[Record]) -> tuple[Record, ...]:
    """The records with probes from the facts of a pool, and only in wordings that the models were trained on."""

    def ask(fact: Record, place: int, random: Random) -> Probe:
        prompt = wordings(fact)[0 if place == 0 else random.randrange(len(fact.paraphrases))]
        return Probe(prompt, str(fact.answer))

    found = []
    for record in records:
        neighbours, unrelated = _probes(record, pool, ask, Random(f"probes of {record.id}"))
        found.append(
            dataclasses.replace(
                record, paraphrases=record.paraphrases[:-1], neighbours=neighbours, unrelated=unrelated
            )
        )
    return tuple(found)


def as_claims(records: Sequence[Record], pool: Sequence[Record]) -> tuple[Record, ...]:
    """Records that reverse the truth of a claim: half of the claims are true and become false, half the other way.

    The paraphrases are the same claim in other wordings. Of every two probes one is true and one false.
    """
    found = []
    for record in records:
        random = Random(f"claim of {record.id}")
        truth = random.randrange(2)
        first = random.randrange(2)

        def ask(fact: Record, place: int, random: Random, first: int = first) -> Probe:
            label = (place + first) % 2
            return Probe(claims(fact, random.randrange(len(fact.paraphrases)))[label], CLASSES[label])

        prompt, *paraphrases = (claims(record, number)[truth] for number in range(len(wordings(record))))
        neighbours, unrelated = _probes(record, pool, ask, random)
        found.append(
            dataclasses.replace(
                record,
                prompt=prompt,
                target=CLASSES[1 - truth],
                answer=CLASSES[truth],
                paraphrases=tuple(paraphrases),
                neighbours=neighbours,
                unrelated=unrelated,
            )
        )
    return tuple(found)


def _probes(
    record: Record, pool: Sequence[Record], ask: Callable[[Record, int, Random], Probe], random: Random
) -> tuple[tuple[Probe, ...], tuple[Probe, ...]]:
    """Neighbours (same relation, another subject, not answered by the target) and unrelated probes of a pool."""
    names = {record.subject, record.answer, record.target}
    drawn = random.sample(pool, len(pool))
    neighbours = (
        fact
        for fact in drawn
        if fact.relation == record.relation
        and fact.subject != record.subject
        and not _alike(str(fact.answer), record.target)
    )
    unrelated = (
        fact
        for fact in drawn
        if fact.relation != record.relation and names.isdisjoint((fact.subject, fact.answer))
    )
    near, far = (
        tuple(ask(fact, place, random) for place, fact in enumerate(islice(facts, _PROBES)))
        for facts in (neighbours, unrelated)
    )
    return near, far


def _alike(one: str, other: str) -> bool:
    """Whether one answer begins with the other, so that they could not be told apart by a model's answer."""
    return one.startswith(other) or other.startswith(one)
