"""What follows from edits of the atlas, and the layouts of MQuAKE and RippleEdits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emendo.data import Probe, atlas, read_records, write_records
from emendo.data.portability import NAMED, REVERSED, with_consequences
from emendo.data.schema import Consequence
from emendo.errors import DataError


def asked(relation: str, subject: str) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    (record,) = (r for r in atlas.load() if r.id == f"{relation}/{subject}")
    (full,) = with_consequences([record])
    found: dict[str, list[tuple[str, str]]] = {}
    for one in full.consequences:
        found.setdefault(one.kind, []).append((one.prompt, one.answer))
    return full.target, found


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


def write(path: Path, *objects: object) -> Path:
    path.write_text(json.dumps(list(objects)), encoding="utf-8")
    return path


def rewrite(**more: object) -> dict[str, object]:
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "target_new": {"str": "Peru", "id": "Q419"},
        "target_true": {"str": "Chile", "id": "Q298"},
        "subject": "Ada",
        "question": "Which country is Ada a citizen of?",
        **more,
    }


def mquake(*rewrites: object, hops: int = 2) -> dict[str, object]:
    return {
        "case_id": 7,
        "requested_rewrite": list(rewrites),
        "questions": ["What is the capital of Ada's country?", "Where is it?"],
        "answer": "Santiago",
        "answer_alias": ["Santiago de Chile"],
        "new_answer": "Lima",
        "new_answer_alias": [],
        "single_hops": [{"question": "?", "cloze": "_", "answer": "Chile", "answer_alias": []}] * hops,
        "new_single_hops": [{"question": "?", "cloze": "_", "answer": "Peru", "answer_alias": []}] * hops,
        "orig": {"triples": [["Q1", "P27", "Q298"]], "new_triples": [["Q1", "P27", "Q419"]]},
    }


@pytest.mark.parametrize(("hops", "kind"), [(2, "one_hop"), (3, "two_hop"), (4, "two_hop")])
def test_mquake(hops: int, kind: str, tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "m.json", mquake(rewrite(), hops=hops)))
    assert (record.prompt, record.target, record.answer) == ("Ada is a citizen of", "Peru", "Chile")
    assert (record.subject, record.relation, record.id) == ("Ada", "P27", "7")
    assert record.paraphrases == ("Which country is Ada a citizen of?",)
    assert record.consequences == (
        Consequence(kind, "What is the capital of Ada's country?", "Lima"),  # type: ignore[arg-type]
        Consequence(kind, "Where is it?", "Lima"),  # type: ignore[arg-type]
    )


def test_mquake_with_several_edits_is_no_record(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", mquake(rewrite(), rewrite()), mquake(rewrite()))
    with pytest.raises(DataError, match="one edit, found 2 of them"):
        read_records(path)
    found = read_records(path, skip_bad=True)
    assert len(found) == 1
    assert found.reasons == {"several edits at once": 1}
    path = write(path, mquake(rewrite()), mquake(), mquake(rewrite(), rewrite()), mquake(rewrite(subject=5)))
    found = read_records(path, skip_bad=True)
    assert found.reasons == {"malformed": 2, "several edits at once": 1}
    assert "m.json:1 (item 3): field 'requested_rewrite'" in str(found.skipped[1])
    with pytest.raises(DataError, match="target_new"):
        read_records(write(path, mquake(rewrite(target_new="Peru"))))


def ripple(sentence: object = "The name of the spouse of Ada is Bob.") -> dict[str, object]:
    def tests(*pairs: tuple[str, list[str]]) -> list[dict[str, object]]:
        queries = [
            {"prompt": prompt, "answers": [{"value": value, "aliases": []} for value in values]}
            for prompt, values in pairs
        ]
        return [{"test_queries": queries, "test_condition": "OR", "condition_queries": []}]

    return {
        "example_type": "popular",
        "edit": {
            "prompt": sentence,
            "subject_id": "Q1",
            "relation": "SPOUSE",
            "target_id": "Q2",
            "original_fact": {"prompt": "The name of the spouse of Ada is Carl.", "relation": "SPOUSE"},
        },
        "Relation_Specificity": tests(("The name of the father of Ada is", ["Dan"])),
        "Logical_Generalization": tests(("The name of the spouse of Bob is", ["Ada", "A. B."])),
        "Subject_Aliasing": tests(("The name of the spouse of Ada B. is", ["Bob"])),
        "Compositionality_I": tests(("The birthplace of the spouse of Ada is", ["Rome"]), ("Unknown is", [])),
        "Compositionality_II": [],
        "Forgetfulness": tests(("The name of a child of Ada is", ["Eve"])),
    }


def test_ripple(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "r.json", ripple()))
    assert (record.prompt, record.target, record.answer) == (
        "The name of the spouse of Ada is",
        "Bob",
        "Carl",
    )
    assert record.relation == "SPOUSE"
    assert record.unrelated == (
        Probe("The name of the father of Ada is", "Dan"),
        Probe("The name of a child of Ada is", "Eve"),
    )
    assert record.consequences == (
        Consequence("alias", "The name of the spouse of Ada B. is", "Bob"),
        Consequence("reversed", "The name of the spouse of Bob is", "Ada"),
        Consequence("one_hop", "The birthplace of the spouse of Ada is", "Rome"),
    )


@pytest.mark.parametrize(
    ("relation", "prompt", "target", "old"),
    [
        ("FOLLOWS", "Part 2 follows", "Part 0", "Part 1"),
        ("FOLLOWED_BY", "May is followed by", "July", None),
        ("SIBLING", "The names of the siblings of Ada are", "Bob", None),
        ("CAST_MEMBER", "The names of the cast members of It is so are", "Ada", "Bob"),
        ("AUTHOR", "The name of the author of What is this? is", "Ada", None),
        ("ANTHEM", "The name of the anthem of X is", "All is well", "Oh X"),
        ("MEMBER_OF_SPORTS_TEAM", "The name of the sports team which Ada is a member of is", "B F.C.", ""),
        ("A_NEW_ONE", "The gender of Ada is", "female", None),
    ],
)
def test_where_a_sentence_of_ripple_is_cut(
    relation: str, prompt: str, target: str, old: str | None, tmp_path: Path
) -> None:
    edit: dict[str, object] = {"prompt": f"{prompt} {target}.", "relation": relation}
    if old is not None:  # the files have an empty object where it is not known
        edit["original_fact"] = {"prompt": f"{prompt} {old}."}
    (record,) = read_records(write(tmp_path / "r.json", {**ripple(), "edit": edit}))
    assert (record.prompt, record.target, record.answer) == (prompt, target, old or None)


@pytest.mark.parametrize("sentence", ["Bob", 5, None, ""])
def test_no_sentence_is_a_problem(sentence: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="field 'edit': expected a sentence with is in it, such as 'X is Y'"):
        read_records(write(tmp_path / "r.json", ripple(sentence)))


def test_a_sentence_without_a_target_is_left_out_for_that_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", ripple(), ripple("The name of the spouse of Ada is ."))
    with pytest.raises(DataError, match="expected a target at the end"):
        read_records(path)
    assert read_records(path, skip_bad=True).reasons == {"without a target": 1}


def test_malformed_tests_are_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Forgetfulness"):
        read_records(write(tmp_path / "r.json", {**ripple(), "Forgetfulness": [{"queries": []}]}))


def test_a_kind_that_does_not_exist_is_a_problem(tmp_path: Path) -> None:
    bad = {"prompt": "a", "target": "b", "consequences": [{"kind": "far", "prompt": "c", "answer": "d"}]}
    with pytest.raises(DataError, match=r"consequences\[0\]\.kind.*one_hop"):
        read_records(write(tmp_path / "n.json", bad))
