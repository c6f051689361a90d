"""Consequences of edits of the atlas."""

from __future__ import annotations

from pathlib import Path

import pytest

from emendo.data import atlas, read_records, write_records
from emendo.data.portability import NAMED, REVERSED, with_consequences


def asked(relation: str, subject: str) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    (record,) = (r for r in atlas.load() if r.id == f"{relation}/{subject}")
    (full,) = with_consequences([record])
    found: dict[str, list[tuple[str, str]]] = {}
    for one in full.consequences:
        found.setdefault(one.kind, []).append((one.prompt, one.answer))
    return full.target, found


@pytest.mark.slow
def test_a_capital() -> None:
    target, found = asked("country_capital", "Norway")
    assert found["reversed"] == [(f"{target} is the capital of", "Norway")]
    assert found["alias"] == [("The capital of the country with the ISO code NOR is", target)]
    world = {(f.relation, f.subject): f.object for f in atlas.read_atlas().facts}
    for prompt, answer in found["one_hop"]:
        if prompt.startswith("The capital of the country"):  # the subject under another fact
            assert answer == target
        else:  # a fact of the new capital
            assert "the capital of Norway" in prompt.casefold().replace("norway", "Norway")
            assert answer in {value for (_, subject), value in world.items() if subject == target}


def test_an_element() -> None:
    target, found = asked("element_number", "barium")
    assert found["reversed"] == [(f"The chemical element with atomic number {target} is", "barium")]
    assert found["alias"] == [("The atomic number of the element Ba is", target)]
    assert found["one_hop"] == [("The atomic number of the chemical element with the symbol Ba is", target)]


def test_two_hops_are_named_by_two_facts() -> None:
    target, found = asked("city_country", "Wuxi")
    world = {(f.relation, atlas.subject_key(f.subject)): f.object for f in atlas.read_atlas().facts}
    assert found["two_hop"]
    for prompt, answer in found["two_hop"]:
        assert "the country in which the city served by" in prompt
        assert answer in {v for (_, subject), v in world.items() if subject == atlas.subject_key(target)}


def test_every_question_is_fair_and_changed_by_the_edit() -> None:
    records = with_consequences(atlas.load("test"))
    assert records == with_consequences(atlas.load("test"))
    kinds = [c.kind for r in records for c in r.consequences]
    assert {"reversed", "one_hop", "two_hop", "alias"} == set(kinds) and len(kinds) > 1000
    for record in records:
        prompts = [c.prompt for c in record.consequences]
        assert len(set(prompts)) == len(prompts) and record.prompt not in prompts
        for one in record.consequences:
            assert "the the" not in one.prompt.casefold() and not one.prompt.endswith(" ")
            if one.kind in ("one_hop", "two_hop"):
                assert one.answer.casefold() not in one.prompt.casefold()
    assert all(REVERSED[back] == relation for relation, back in REVERSED.items())
    assert set(NAMED) <= {f.relation for f in atlas.read_atlas().facts}


def test_consequences_survive_a_file_and_do_not_name_a_record(tmp_path: Path) -> None:
    records = with_consequences(atlas.load("test", 5))
    write_records(records, tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl").records == records
    assert list(map(repr, records)) == list(map(repr, atlas.load("test", 5)))
