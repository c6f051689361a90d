"""Published layouts: where their fields go, in every form of file, and what is not read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data.layouts import SAMPLES, Sample, mquake, rewrite, ripple, table
from emendo.data import Consequence, Probe, Record, read_records
from emendo.data._layouts import LAYOUTS, find_layout
from emendo.errors import DataError

SAMPLE = {sample.layout: sample for sample in SAMPLES}
NAMES = [sample.layout for sample in SAMPLES]


def write(path: Path, *objects: object) -> Path:
    path.write_text(json.dumps(list(objects)), encoding="utf-8")
    return path


def changed(layout: str, **more: Any) -> dict[str, Any]:
    """The sample of a layout with other fields; None takes one out."""
    raw = {**SAMPLE[layout].raw, **more}
    return {key: value for key, value in raw.items() if value is not None}


def test_every_layout_has_a_sample_and_a_row_in_the_documentation() -> None:
    assert {layout.name for layout in LAYOUTS} == set(NAMES)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert table() in page, "renew it: PYTHONPATH=src:tests python tests/data/layouts.py"


@pytest.mark.parametrize("form", ["lines", "array", "object", "pretty"])
@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_a_layout(sample: Sample, form: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    text = json.dumps(sample.raw, ensure_ascii=False)
    match form:
        case "lines":
            path.write_text(f"{text}\n{text}\n", encoding="utf-8")
        case "array":
            path.write_text(f"[{text},\n{text}]", encoding="utf-8")
        case "object":
            path.write_text(text, encoding="utf-8")
        case "pretty":
            path.write_text(json.dumps(sample.raw, indent=2), encoding="utf-8")
    found = read_records(path)
    assert found.records == (sample.record,) * len(found)
    assert len(found) == (2 if form in ("lines", "array") else 1)
    assert found.layout == sample.layout
    assert found.unused == dict.fromkeys(sample.unused, len(found))


MARK = "\N{SECTION SIGN}"
CUT = (  # texts that are taken apart; what is put into a template or is no text of its own
    *("edit.prompt", "original_fact.prompt", "original"),
    *("subject", "kind"),
)


@pytest.mark.parametrize("space", [" ", "  ", "\n", "\t", "\u3000", "\u00a0"])
@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_white_space_at_the_end_of_a_text_is_kept(sample: Sample, space: str) -> None:
    layout = find_layout(sample.raw)
    assert layout is not None
    read = 0
    for (path, named), (_, spaced) in zip(ended(sample.raw, MARK), ended(sample.raw, space), strict=True):
        record, plain = layout.read(spaced)[0], layout.read(named)[0]
        if plain != sample.record and not path.endswith(CUT):
            read += 1
            for text, letter, before in zip(texts(record), texts(plain), texts(sample.record), strict=True):
                assert text == (before + space if letter == before + MARK else before), path
    assert read


def ended(value: object, end: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every text in a value by its path, with a copy of the value in which it has another end."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            for found, changed in ended(inner, end, f"{path}.{key}".lstrip(".")):
                copy = value.copy()
                copy[key] = changed
                yield found, copy
    elif isinstance(value, str):
        yield path, value + end


def texts(value: object) -> Iterator[str]:
    """All texts of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Record | Probe | Consequence):
        for inner in asdict(value).values():
            yield from texts(inner)
    elif isinstance(value, dict | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


FLAT = [sample for sample in SAMPLES if all(isinstance(v, str | int) for v in sample.raw.values())]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("sample", FLAT, ids=[sample.layout for sample in FLAT])
def test_a_layout_as_a_table(sample: Sample, delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, sample.raw, delimiter=delimiter)
        writer.writeheader()
        writer.writerows([sample.raw] * 2)
    found = read_records(path)
    assert (found.layout, found.records) == (sample.layout, (sample.record,) * 2)
    assert list(found.lines) == [2, 3]


def test_a_table_with_lists_and_texts_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(
        "prompt,target,subject,paraphrases,answer\n"
        '"Bada\'s capital, as of\n1999, is",Oslo,Bada,"[""In Bada, the capital is"", ""x""]",\n'
        ",,,,\n"
        'A list is,"[1, 2]",,One wording,none\n'
        "Python is,a language,,\"['as pandas', 'writes it']\",\n",
        encoding="utf-8",
    )
    found = read_records(path)
    assert found.records == (
        Record(
            "Bada's capital, as of\n1999, is", "Oslo", "Bada", paraphrases=("In Bada, the capital is", "x")
        ),
        Record("A list is", "[1, 2]", paraphrases=("One wording",), answer="none"),
        Record("Python is", "a language", paraphrases=("as pandas", "writes it")),
    )
    assert list(found.lines) == [2, 5, 6]


COLUMNS = {"prompt": ["A is", "B is"], "target": ["1", "2"], "subject": ["A", None]}


@pytest.mark.parametrize(
    "content",
    [
        COLUMNS,
        {key: dict(enumerate(column)) for key, column in COLUMNS.items()},
        {"data": [{"prompt": "A is", "target": "1", "subject": "A"}, {"prompt": "B is", "target": "2"}]},
        {
            "train": [{"prompt": "A is", "target": "1", "subject": "A"}],
            "version": 2,
            "test": [{"prompt": "B is", "target": "2"}],
        },
        {"0": {"prompt": "A is", "target": "1", "subject": "A"}, "1": {"prompt": "B is", "target": "2"}},
    ],
    ids=["lists", "pandas columns", "wrapped", "parts", "pandas index"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_that_holds_records(content: object, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    assert read_records(path).records == (Record("A is", "1", "A"), Record("B is", "2"))


def test_lists_of_dune(tmp_path: Path) -> None:
    path = tmp_path / "new_info.json"
    lists = {
        "edits": ["In 2022, X came into effect.", "Wet palms rub less."],
        "test_inputs": [
            [["What came in 2022?", "X"], ["When did X come?", "2022"]],
            ["Which palms?\nA. dry", "A"],
        ],
        "note": "of both",
    }
    path.write_text(json.dumps(lists), encoding="utf-8")
    found = read_records(path)
    assert found.records == (
        Record("What came in 2022?", "X", consequences=(Consequence("one_hop", "When did X come?", "2022"),)),
        Record("Which palms?\nA. dry", "A"),
    )
    assert found.unused == {"edits": 2, "note": 2}
    path.write_text(json.dumps({**lists, "edits": ["one"]}), encoding="utf-8")
    with pytest.raises(DataError, match="these differ in length: 'edits' 1, 'test_inputs' 2"):
        read_records(path)


OPTIONAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("CounterFact, one paraphrase", {"ground_truth": ""}, {"answer": None}),
    ("CounterFact, one paraphrase", {"ground_truth": " "}, {"answer": None}),
    ("CounterFact, one paraphrase", {"ground_truth": ["Paris"]}, {"answer": "Paris"}),
    ("CounterFact, one paraphrase", {"ground_truth": []}, {"answer": None}),
    ("CounterFact, one paraphrase", {"ground_truth": 1987}, {"answer": "1987"}),
    ("CounterFact, one paraphrase", {"locality_ground_truth": None}, {"neighbours": ()}),
    ("CounterFact, one paraphrase", {"locality_ground_truth": ""}, {"neighbours": ()}),
    ("CounterFact, one paraphrase", {"locality_prompt": ""}, {"neighbours": ()}),
    ("CounterFact, one paraphrase", {"rephrase_prompt": ""}, {"paraphrases": ()}),
    ("CounterFact, one paraphrase", {"rephrase_prompt": ["a", "b"]}, {"paraphrases": ("a", "b")}),
    ("CounterFact, one paraphrase", {"subject": ""}, {"subject": None}),
    ("zsRE", {"answers": "1987"}, {"answer": "1987"}),
    ("zsRE", {"answers": []}, {"answer": "1998"}),
    ("zsRE", {"answers": None}, {"answer": "1998"}),
    ("zsRE", {"loc": None}, {"unrelated": ()}),
    ("zsRE", {"portability": None}, {"consequences": ()}),
    ("KnowEdit", {"locality": {}}, {"unrelated": ()}),
    ("KnowEdit", {"portability": {"Reasoning": []}}, {"consequences": ()}),
    ("KnowEdit", {"ground_truth": "Initech"}, {"answer": "Initech"}),
    ("KnowEdit", {"ground_truth": {"str": "Initech"}}, {"answer": "Initech"}),
    ("WikiBigEdit", {"mhop_ans": None}, {"consequences": ()}),
    ("UnKE", {"sub_question": None, "sub_answer": None}, {"consequences": ()}),
    ("emendo", {"answer": " "}, {"answer": None}),
    ("CounterFact", {"neighborhood_prompts": []}, {"neighbours": ()}),
    (
        "CounterFact",
        {"neighborhood_prompts": [{"prompt": "Bergen is in", "target": "Norge"}]},
        {"neighbours": (Probe("Bergen is in", "Norge"),)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "expected"), OPTIONAL, ids=[f"{o[0]} {o[1]}" for o in OPTIONAL])
def test_optional_fields_are_optional(
    layout: str, change: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    (record,) = read_records(write(tmp_path / "a.json", {**SAMPLE[layout].raw, **change}))
    whole = SAMPLE[layout].record
    for name in Record.__dataclass_fields__:
        assert getattr(record, name) == expected.get(name, getattr(whole, name)), name


def test_locality_without_an_answer_is_counted(tmp_path: Path) -> None:
    bare = changed("CounterFact, one paraphrase", locality_ground_truth=None)
    found = read_records(write(tmp_path / "a.json", bare, SAMPLE["CounterFact, one paraphrase"].raw, bare))
    assert found.unused == {"locality_prompt (no answer)": 2}
    assert [len(record.neighbours) for record in found] == [0, 1, 0]


def test_groups_of_locality_and_portability_in_other_forms(tmp_path: Path) -> None:
    locality = {
        "neighborhood": {"prompt": "Al Hu works for", "ground_truth": "Hooli"},
        "distracting": {"prompt": ["One is", "Two is"], "ground_truth": ["1", "2"]},
    }
    portability = {
        "one_hop": {"prompt": "The seat is", "ground_truth": "Oslo"},
        "a new kind": [{"prompt": "x", "ground_truth": "y"}],
    }
    raw = changed("KnowEdit", locality=locality, portability=portability)
    found = read_records(write(tmp_path / "a.json", raw))
    assert found[0].neighbours == (Probe("Al Hu works for", "Hooli"),)
    assert found[0].unrelated == (Probe("One is", "1"), Probe("Two is", "2"))
    assert found[0].consequences == (Consequence("one_hop", "The seat is", "Oslo"),)
    assert found.unused == {"ground_truth[1:]": 1, "portability.a new kind": 1}


TEMPLATES: list[tuple[str, str]] = [
    ("{} is a citizen of", "Ada is a citizen of"),
    ("Where does {subject} live?", "Where does Ada live?"),
    ("[X] is a citizen of", "Ada is a citizen of"),
    ("[X] is a citizen of [Y] .", "Ada is a citizen of "),
    ("[X] is a citizen of:\n[Y]", "Ada is a citizen of:\n"),
    ("The book of [SUBJECT] is by", "The book of Ada is by"),
    ("In Python, a set is {1, 2} and a pair of braces {{}}", "In Python, a set is {1, 2} and a pair of braces {{}}"),
    ("A list [1] of [Y]", "A list [1] of [Y]"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "filled"), TEMPLATES)
def test_templates_are_filled_with_the_subject(template: str, filled: str, tmp_path: Path) -> None:
    raw = {
        "prompt": template,
        "subject": "Ada",
        "target": "Peru",
        "paraphrases": [template, "x"],
        "neighbours": [{"prompt": template, "answer": "Chile"}],
        "unrelated": [{"prompt": template, "answer": "Chile"}],
        "consequences": [{"kind": "one_hop", "prompt": template, "answer": "Lima"}],
    }
    (record,) = read_records(write(tmp_path / "a.json", raw))
    prompts = [probe.prompt for probe in (*record.neighbours, *record.unrelated, *record.consequences)]
    assert [record.prompt, record.paraphrases[0], *prompts] == [filled] * 5
    nested = changed("KnowEdit", prompt=template, rephrase=template, subject="Ada")
    (record,) = read_records(write(tmp_path / "b.json", nested))
    assert (record.prompt, record.paraphrases) == (filled, (filled,))


@pytest.mark.parametrize("field", ["prompt", "paraphrases", "neighbours"])
def test_a_template_without_a_subject_is_a_problem(field: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = {"prompt": "A is", "target": "b", "paraphrases": [], "neighbours": []}
    raw[field] = {
        "prompt": "{} is",
        "paraphrases": ["[X] is"],
        "neighbours": [{"prompt": "{} is", "answer": "c"}],
    }[field]
    with pytest.raises(
        DataError, match="expected a subject to fill a template with, found none, and the text"
    ):
        read_records(write(tmp_path / "a.json", raw))


def test_a_template_with_its_answer_elsewhere(tmp_path: Path) -> None:
    raw = {
        "prompt": "[X] is in [Y] .",
        "target": "Peru",
        "subject": "Ada",
        "paraphrases": ["[Y] is where [X] is"],
    }
    found = read_records(write(tmp_path / "a.json", raw))
    assert found[0] == Record("Ada is in ", "Peru", "Ada")
    assert found.unused == {"paraphrases (answer not at the end)": 1}
    with pytest.raises(DataError, match=r"field 'prompt': expected the answer's place '\[Y\]' at the end"):
        read_records(write(tmp_path / "a.json", {**raw, "prompt": "[Y] is where [X] is"}))


@pytest.mark.parametrize(("hops", "kind"), [(2, "one_hop"), (3, "two_hop"), (4, "two_hop")])
def test_hops_of_mquake(hops: int, kind: str, tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "m.json", mquake(rewrite(), hops=hops)))
    assert [one.kind for one in record.consequences] == [kind, kind]


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


def test_fever(tmp_path: Path) -> None:
    claim = {"id": 7, "input": "Nepal borders France.", "output": [{"answer": "REFUTES", "provenance": []}]}
    asked = {**claim, "prediction": "SUPPORTS", "alternatives": ["REFUTES"], "logit": 1.5}
    own_words = ["Nepal borders France.", "France is bordered by Nepal."]
    rephrased = {**asked, "filtered_rephrases": own_words}
    plain, own = read_records(write(tmp_path / "kilt.json", claim, rephrased))
    assert plain == Record("Nepal borders France.", "SUPPORTS", id="7", answer="REFUTES")
    assert (own.target, own.paraphrases) == ("REFUTES", ("France is bordered by Nepal.",))


def test_records_of_kilt_that_cannot_be_edited(tmp_path: Path) -> None:
    raw = SAMPLE["KILT"].raw
    path = write(tmp_path / "a.json", raw, {**raw, "alternatives": []}, {**raw, "filtered_rephrases": []})
    found = read_records(path, skip_bad=True, need_paraphrase=True)
    assert len(found) == 1
    assert found.reasons == {"without a target": 1, "malformed": 1}


def test_one_of_several_alternatives_is_the_target(tmp_path: Path) -> None:
    raws = [
        {**SAMPLE["KILT"].raw, "input": f"Who is {i}?", "alternatives": ["you", "he", "she"]}
        for i in range(40)
    ]
    path = write(tmp_path / "a.json", *raws)
    targets = [record.target for record in read_records(path)]
    assert set(targets) == {"you", "he", "she"}
    assert targets == [record.target for record in read_records(path)]


def test_the_file_of_the_generation_set(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    passages = ["The mill stands by the river", "A fox sleeps in the mill"]
    sampled = [" and grinds", ", as ever"]
    completions = ["".join(pair) for pair in zip(passages, sampled, strict=True)]
    path.write_text(json.dumps({"n_tokens": 10, "original": passages, "completions": completions}))
    found = read_records(path)
    assert [(record.prompt, record.target) for record in found] == list(zip(passages, sampled, strict=True))
    for record in found:
        assert all(record.prompt.endswith(text) for text in record.paraphrases)
        assert all(len(text.split()) >= len(record.prompt.split()) / 2 for text in record.paraphrases)
    path.write_text(json.dumps({"original": [passages[0] + " in Spain"], "completions": completions[:1]}))
    assert read_records(path)[0] == found[0]
