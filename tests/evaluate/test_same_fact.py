"""Which edits a neighbour asks for, by names and wordings."""

from __future__ import annotations

import pytest

from emendo.data import Record
from emendo.evaluate.same_fact import SameFact

RECORDS = [
    Record("Kant lived in", "Rome", "Kant", paraphrases=("It rained. Kant was at home in",)),
    Record("Hume lived in", "Oslo", "Hume", paraphrases=("Hume has a house in",)),
    Record("Mill wrote", "plays", "Mill"),
    Record("John Mill was at home in", "Riga", "John Mill"),
]


@pytest.mark.parametrize(
    ("prompt", "like", "edits"),
    [
        ("Hume lived in", 0, [1]),  # the edit's own wording
        ("Hume was at home in", 0, [1]),  # a wording of the record whose neighbour it is
        ("Hume was at home in", 2, [1]),  # which stands beside the edit's wording in another record
        ("Hume wrote", 2, []),  # another relation
        ("Locke lived in", 0, []),
        ("John Mill was at home in", 1, [3]),  # and Mill is within a longer name
        ("hume lived in", 0, []),
    ],
)
def test_a_neighbour_asks_for_the_edit_of_its_subject_and_relation(
    prompt: str, like: int, edits: list[int]
) -> None:
    assert SameFact(RECORDS).asked(prompt, like) == edits


def test_names_of_relations_decide_where_both_records_have_one() -> None:
    records = [Record("Hume lived in", "Oslo", "Hume", "P1"), Record("Kant lived in", "Rome", "Kant", "P2")]
    assert SameFact(records).asked("Hume lived in", 1) == []
    assert SameFact(records).asked("Hume sleeps at", 0) == [0]
