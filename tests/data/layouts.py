"""A sample of every layout, with the record that it is: all texts made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from emendo.data import Consequence, Probe, Record
from emendo.data._layouts import find_layout
from emendo.data.schema import CONSEQUENCES


class Sample(NamedTuple):
    """A raw record of a layout.

    Attributes:
        layout: its name.
        raw: the object; for a table all values are texts.
        record: what it is read as.
        unused: the fields that are not read.
    """

    layout: str
    raw: dict[str, Any]
    record: Record
    unused: tuple[str, ...] = ()


def rewrite(**more: object) -> dict[str, object]:
    """The edit of a MQuAKE case."""
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
    """A case of MQuAKE."""
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


def ripple(sentence: object = "The name of the spouse of Ada is Bob.") -> dict[str, object]:
    """A case of RippleEdits."""

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


SAMPLES = (
    Sample(
        "emendo",
        {
            "prompt": "The capital of France is",
            "target": "Rome",
            "subject": "France",
            "relation": "capital",
            "id": 3,
            "paraphrases": ["France's capital is"],
            "neighbours": [{"prompt": "The capital of Spain is ", "answer": " Madrid"}],
            "unrelated": [{"prompt": "Two and two is", "answer": "four"}],
            "answer": "Paris",
            "separator": "\n",
            "consequences": [{"kind": "reversed", "prompt": "Rome is the capital of", "answer": "France"}],
            "note": "other keys are not read",
        },
        Record(
            "The capital of France is",
            "Rome",
            "France",
            "capital",
            "3",
            ("France's capital is",),
            (Probe("The capital of Spain is ", " Madrid"),),
            (Probe("Two and two is", "four"),),
            "Paris",
            (Consequence("reversed", "Rome is the capital of", "France"),),
            "\n",
        ),
        ("note",),
    ),
    Sample(
        "CounterFact",
        {
            "case_id": 5,
            "pararel_idx": 12,
            "requested_rewrite": {
                "prompt": "{} is in",
                "relation_id": "P17",
                "subject": "Oslo",
                "target_new": {"str": "Peru", "id": "Q419"},
                "target_true": {"str": "Norway", "id": "Q20"},
            },
            "paraphrase_prompts": ["Some text. Oslo lies in", "Oslo, located in"],
            "neighborhood_prompts": ["Bergen is in", "Tromsø is in "],
            "attribute_prompts": ["Lima is in"],
            "generation_prompts": ["Oslo is known for", "Around Oslo, one sees"],
        },
        Record(
            "Oslo is in",
            "Peru",
            "Oslo",
            "P17",
            "5",
            ("Some text. Oslo lies in", "Oslo, located in"),
            (Probe("Bergen is in", "Norway"), Probe("Tromsø is in ", "Norway")),
            answer="Norway",
        ),
        ("attribute_prompts", "generation_prompts", "pararel_idx", "requested_rewrite.target_new.id"),
    ),
    Sample(
        "CounterFact, one paraphrase",
        {
            "case_id": 7,
            "prompt": "The mother tongue of Danielle is ",
            "target_new": " English",
            "subject": "Danielle",
            "ground_truth": "French",
            "rephrase_prompt": "Danielle speaks the language of ",
            "locality_prompt": "Michel is a native speaker of",
            "locality_ground_truth": "French",
        },
        Record(
            "The mother tongue of Danielle is ",
            " English",
            "Danielle",
            None,
            "7",
            ("Danielle speaks the language of ",),
            (Probe("Michel is a native speaker of", "French"),),
            answer="French",
        ),
    ),
    Sample(
        "KnowEdit",
        {
            "case_id": 9,
            "subject": "Bo Li",
            "prompt": "The name of the employer of Bo Li is",
            "target_new": "Acme",
            "ground_truth": [["Initech", "Initech Inc."]],
            "rephrase": "Bo Li works for",
            "portability": {
                "Reasoning": [{"prompt": "The seat of the employer of Bo Li is", "ground_truth": [["Oslo"]]}],
                "Subject_Aliasing": [{"prompt": "The employer of B. Li is", "ground_truth": "Acme"}],
                "Logical_Generalization": [{"prompt": "An employee of Acme is", "ground_truth": ["Bo Li"]}],
            },
            "locality": {
                "Relation_Specificity": [{"prompt": "Bo Li was born in", "ground_truth": [["Rome", "Roma"]]}],
                "Forgetfulness": [{"prompt": "Another employer of Bo Li is", "ground_truth": ["Hooli"]}],
            },
        },
        Record(
            "The name of the employer of Bo Li is",
            "Acme",
            "Bo Li",
            id="9",
            paraphrases=("Bo Li works for",),
            unrelated=(Probe("Bo Li was born in", "Rome"), Probe("Another employer of Bo Li is", "Hooli")),
            answer="Initech",
            consequences=(
                Consequence("one_hop", "The seat of the employer of Bo Li is", "Oslo"),
                Consequence("alias", "The employer of B. Li is", "Acme"),
                Consequence("reversed", "An employee of Acme is", "Bo Li"),
            ),
        ),
        ("ground_truth[1:]", "locality.Relation_Specificity.ground_truth[1:]"),
    ),
    Sample(
        "zsRE",
        {
            "subject": "WEFS",
            "src": "When was WEFS established?",
            "pred": "1998",
            "rephrase": "When has WEFS been established?",
            "alt": "1997",
            "answers": ["1987", "1988"],
            "loc": "nq question: who sang it",
            "loc_ans": "Nobody",
            "cond": "1998 >> 1997 || When was WEFS established?",
            "portability": {
                "Recalled Relation": "(WEFS, city, Rome)",
                "New Question": "In which year was the radio of Rome established?",
                "New Answer": "1997 in Rome",
            },
        },
        Record(
            "When was WEFS established?",
            "1997",
            "WEFS",
            paraphrases=("When has WEFS been established?",),
            unrelated=(Probe("nq question: who sang it", "Nobody"),),
            answer="1987",
            consequences=(
                Consequence("one_hop", "In which year was the radio of Rome established?", "1997 in Rome"),
            ),
        ),
        ("answers[1:]", "cond", "portability.Recalled Relation"),
    ),
    Sample(
        "MQuAKE",
        mquake(rewrite(fact_new_uns="A long text on Ada and Peru.")),
        Record(
            "Ada is a citizen of",
            "Peru",
            "Ada",
            "P27",
            "7",
            ("Which country is Ada a citizen of?",),
            answer="Chile",
            consequences=(
                Consequence("one_hop", "What is the capital of Ada's country?", "Lima"),
                Consequence("one_hop", "Where is it?", "Lima"),
            ),
        ),
        (
            "answer",
            "answer_alias",
            "orig",
            "requested_rewrite[].fact_new_uns",
            "requested_rewrite[].target_new.id",
            "single_hops",
        ),
    ),
    Sample(
        "RippleEdits",
        ripple(),
        Record(
            "The name of the spouse of Ada is",
            "Bob",
            relation="SPOUSE",
            unrelated=(
                Probe("The name of the father of Ada is", "Dan"),
                Probe("The name of a child of Ada is", "Eve"),
            ),
            answer="Carl",
            consequences=(
                Consequence("alias", "The name of the spouse of Ada B. is", "Bob"),
                Consequence("reversed", "The name of the spouse of Bob is", "Ada"),
                Consequence("one_hop", "The birthplace of the spouse of Ada is", "Rome"),
            ),
        ),
        (
            "Compositionality_I (no answer)",
            "Compositionality_I.test_condition",
            "Forgetfulness.test_condition",
            "Logical_Generalization.test_condition",
            "Logical_Generalization.test_queries.answers[1:]",
            "Relation_Specificity.test_condition",
            "Subject_Aliasing.test_condition",
            "example_type",
        ),
    ),
    Sample(
        "WikiBigEdit",
        {
            "tag": "update",
            "subject": "Bo Li",
            "update": "Who employs Bo Li?",
            "rephrase": "Whom does Bo Li work for?",
            "ans": "Acme",
            "loc": "Who employs Al Hu?",
            "loc_ans": "Hooli",
            "mhop": "Where is the employer of Bo Li?",
            "mhop_ans": "Oslo",
            "personas": "Arr, who be payin' Bo Li?",
        },
        Record(
            "Who employs Bo Li?",
            "Acme",
            "Bo Li",
            paraphrases=("Whom does Bo Li work for?", "Arr, who be payin' Bo Li?"),
            unrelated=(Probe("Who employs Al Hu?", "Hooli"),),
            consequences=(Consequence("one_hop", "Where is the employer of Bo Li?", "Oslo"),),
        ),
        ("tag",),
    ),
    Sample(
        "QAEdit",
        {
            "id": 12,
            "source": "nq",
            "prompt": "Who wrote the anthem of Bada?",
            "target": "Al Hu",
            "subject": "the anthem of Bada",
            "rephrase": "Who is the author of the anthem of Bada?",
            "locality": [{"loc": "nq question: who sang it", "loc_ans": "Nobody"}],
        },
        Record(
            "Who wrote the anthem of Bada?",
            "Al Hu",
            "the anthem of Bada",
            id="12",
            paraphrases=("Who is the author of the anthem of Bada?",),
            unrelated=(Probe("nq question: who sang it", "Nobody"),),
        ),
        ("source",),
    ),
    Sample(
        "UnKE",
        {
            "id": 0,
            "question": "What is Bo Li known for?",
            "para_question": "For what do people know Bo Li?",
            "answer": "Bo Li founded Acme in Oslo. He is also a painter.",
            "sub_question": ["Where did Bo Li found Acme?", "What else is Bo Li?"],
            "sub_answer": ["Oslo", "A painter"],
        },
        Record(
            "What is Bo Li known for?",
            "Bo Li founded Acme in Oslo. He is also a painter.",
            id="0",
            paraphrases=("For what do people know Bo Li?",),
            consequences=(
                Consequence("one_hop", "Where did Bo Li found Acme?", "Oslo"),
                Consequence("one_hop", "What else is Bo Li?", "A painter"),
            ),
        ),
    ),
    Sample(
        "HalluEditBench",
        {
            "topic": "places",
            "subject": "Mount Bada",
            "relation": "country",
            "object": "Peru",
            "question": "In which country is Mount Bada?",
            "paraphrased_question": "Which country has Mount Bada?",
            "locality_question": "In which year was Mount Bada climbed?",
            "question_2hop": "What is the capital of the country of Mount Bada?",
            "answer_2hop": "Lima",
            "question_3hop": "Which river is in the capital of the country of Mount Bada?",
            "answer_3hop": "Rímac",
            "yes_question": "Is Mount Bada in Peru?",
            "reversed_relation_question": "Which mountain is in Peru?",
        },
        Record(
            "In which country is Mount Bada?",
            "Peru",
            "Mount Bada",
            "country",
            paraphrases=("Which country has Mount Bada?",),
            consequences=(
                Consequence("one_hop", "What is the capital of the country of Mount Bada?", "Lima"),
                Consequence(
                    "two_hop", "Which river is in the capital of the country of Mount Bada?", "Rímac"
                ),
                Consequence("reversed", "Which mountain is in Peru?", "Mount Bada"),
            ),
        ),
        ("locality_question (no answer)", "topic", "yes_question"),
    ),
    Sample(
        "DUNE",
        {
            "edits": "82 / 2 + 41 = 82",
            "test_inputs": "Two of them share $82, and one pays $41 more. How much?",
        },
        Record(
            "82 / 2 + 41 =",
            "82",
            consequences=(
                Consequence("one_hop", "Two of them share $82, and one pays $41 more. How much?", "82"),
            ),
        ),
    ),
    Sample(
        "KILT",
        {
            "id": "3f5a",
            "input": "When was WEFS established?",
            "output": [{"provenance": [{"title": "WEFS"}]}, {"answer": "1987"}, {"answer": "the year 1987"}],
            "meta": {"template_questions": ["When was WEFS established?"]},
            "prediction": "1998",
            "alternatives": ["1997", "1997"],
            "rephrases": ["When was WEFS set up?", "When has WEFS been established?"],
            "filtered_rephrases": ["When has WEFS been established?"],
        },
        Record(
            "When was WEFS established?",
            "1997",
            id="3f5a",
            paraphrases=("When has WEFS been established?",),
            answer="1987",
        ),
        ("alternatives (all but one)", "meta", "rephrases"),
    ),
    Sample(
        "Wikitext generation",
        {
            "n_tokens": 10,
            "original": " The red fox crosses the river at night",
            "completions": " The red fox crosses the river at night, and the mill stands still.",
        },
        Record(
            " The red fox crosses the river at night",
            ", and the mill stands still.",
            paraphrases=(
                "red fox crosses the river at night",
                "fox crosses the river at night",
                "the river at night",
            ),
            separator="",
        ),
    ),
)


def table() -> str:
    """The table of layouts in ``docs/data.md``: what goes where is found by changing one field after the other."""
    lines = ["| layout | where its fields go |", "| --- | --- |"]
    for sample in SAMPLES:
        layout = find_layout(sample.raw)
        assert layout is not None
        read: dict[str, list[str]] = {name: [] for name in Record.__dataclass_fields__}
        for path, changed in _changes(sample.raw):
            record, _ = layout.read(changed)
            places = [name for name in read if getattr(record, name) != getattr(sample.record, name)]
            for name in ["subject"] if "subject" in places and path.endswith("subject") else places:
                if path not in read[name]:
                    read[name].append(path)
        cells = [
            f"{name}: {', '.join(f'`{path}`' for path in paths)}" for name, paths in read.items() if paths
        ]
        lines.append(f"| {sample.layout} | {'; '.join(cells)} |")
    return "\n".join(lines)


def _changes(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every text and number in a value by its path, with a copy of the value in which it is another one."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            where = f"{path}[]" if isinstance(value, list) else f"{path}.{key}".lstrip(".")
            for found, changed in _changes(inner, where):
                copy = value.copy()
                copy[key] = changed
                yield found, copy
    elif isinstance(value, str):
        yield path, f"1 + {value}"
        yield path, value.rstrip(".") + "z"
        if value in CONSEQUENCES:
            yield path, next(kind for kind in CONSEQUENCES if kind != value)
    elif isinstance(value, int):
        yield path, value + 1


if __name__ == "__main__":
    print(table())  # noqa: T201
