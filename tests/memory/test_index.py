"""The index finds what a search through all scopes finds, and forgets what is taken out."""

from __future__ import annotations

import random

import numpy as np

from emendo.memory.index import Index, Scope
from emendo.memory.words import Prompt, occurs

NAMES = ["Ada Lopez", "Bo Chen", "Ada Smith", "Chen", "New Lopez", "Dov", "Uru", "Pell Abd"]
FORMS = ["The mother tongue of {} is", "{} was born in", "Where does {} work? In"]


def scopes(count: int) -> list[Scope]:
    rng = random.Random(0)
    return [
        Scope(n, Prompt.read(rng.choice(FORMS).format(name := rng.choice(NAMES)), name)) for n in range(count)
    ]


def test_every_scope_whose_subject_is_named_is_found() -> None:
    index, own = Index(), scopes(60)
    index.add(own)
    for name in NAMES:
        query = Prompt.read(f"It rained. {name}, born in")
        named = {row for row, scope in enumerate(own) if occurs(scope.prompt.subject, query.words)}
        assert named <= set(index.candidates(query))


def test_the_nearest_subject_keys_are_found() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(40, 2, 6)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    index = Index(6)
    for start in range(0, 40, 7):
        index.add(scopes(40)[start : start + 7], keys[start : start + 7])
    for want in (3, 39):
        nearest = np.argsort(keys[:, 0] @ keys[want, 0])[-8:]
        assert set(nearest) <= set(index.candidates(Prompt.read("xyzzy"), keys[want]))
    assert np.array_equal(index.key([5, 39]), keys[[5, 39]])


def test_what_is_taken_out_is_as_if_it_had_never_been_there() -> None:
    own, query = scopes(60), Prompt.read("Ada Smith was born in")
    index, without = Index(), Index()
    index.add(own)
    gone = {3, 17, 42}
    for edit in gone:
        index.remove(edit)
    without.add([scope for scope in own if scope.edit not in gone])
    found = [index.scopes[row] for row in index.candidates(query)]
    assert set(found) == {without.scopes[row] for row in without.candidates(query)}
    assert len(index) == 57
