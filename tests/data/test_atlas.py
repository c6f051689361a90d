"""The built-in facts: counts, splits, wording, records, and that a rebuild gives the same facts."""

import gzip
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib import metadata, resources
from pathlib import Path

import pytest

from emendo.data import Record, read_records
from emendo.data.atlas import SPLITS, Atlas, read_atlas, render, split_of, subject_key
from emendo.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return read_atlas()


@pytest.fixture(scope="module")
def records() -> dict[str, tuple[Record, ...]]:
    return {split: read_records("atlas", split=split, need_paraphrase=True).records for split in SPLITS}


def test_counts(atlas: Atlas, records: dict[str, tuple[Record, ...]]) -> None:
    assert len(atlas.facts) >= 5_000
    assert len(atlas.prompts) >= 12
    assert sum(map(len, records.values())) == len(atlas.facts)
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(records[split]) / len(atlas.facts) - share) < 0.02
        assert {record.relation for record in records[split]} == set(atlas.prompts)
    assert (resources.files("emendo.data") / "atlas.json.gz").stat().st_size < 500_000  # type: ignore[attr-defined]


def test_no_subject_is_in_two_splits(records: dict[str, tuple[Record, ...]]) -> None:
    subjects = [{subject_key(record.subject or "") for record in records[split]} for split in SPLITS]
    assert not (subjects[0] & subjects[1])
    assert not (subjects[0] & subjects[2])
    assert not (subjects[1] & subjects[2])


def test_probes_come_from_the_split_of_their_record(
    atlas: Atlas, records: dict[str, tuple[Record, ...]]
) -> None:
    splits = defaultdict(set)
    for fact in atlas.facts:
        for prompt in atlas.prompts[fact.relation]:
            splits[render(prompt, fact.subject)].add(split_of(fact.subject))
    for split in SPLITS:
        probes = {probe.prompt for r in records[split] for probe in r.neighbours + r.unrelated}
        assert all(splits[prompt] == {split} for prompt in probes)


def test_a_split_does_not_depend_on_how_a_name_is_written() -> None:
    assert split_of("the Netherlands") == split_of("The netherlands") == split_of("Netherlands")
    assert split_of("Bogotá") == split_of("bogota")
    assert [split_of(name) for name in ("France", "Germany", "iron", "Egypt")] == [
        "train", "test", "train", "test",
    ]  # fmt: skip


def test_facts(atlas: Atlas) -> None:
    pairs = [(fact.relation, subject_key(fact.subject)) for fact in atlas.facts]
    assert len(set(pairs)) == len(pairs), "one answer a subject and relation"
    kinds = defaultdict(set)
    wording = tomllib.loads((resources.files("emendo.data") / "atlas_templates.toml").read_text("utf-8"))
    for fact in atlas.facts:
        kinds[subject_key(fact.subject)].add(wording[fact.relation]["subject"])
        for text in (fact.subject, fact.object):
            assert text == text.strip()
            assert "  " not in text
            assert len(text) <= 50
            assert all(ord(char) < 256 for char in text), text
    assert all(len(kind) == 1 for kind in kinds.values()), "a subject is one kind of thing"


@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("country_capital", "France", "Paris"),
        ("country_capital", "the Netherlands", "Amsterdam"),
        ("capital_country", "Ottawa", "Canada"),
        ("country_currency", "Japan", "Japanese yen"),
        ("country_language", "Brazil", "Portuguese"),
        ("country_continent", "Kenya", "Africa"),
        ("country_calling_code", "Italy", "+39"),
        ("country_domain", "the United Kingdom", ".uk"),
        ("city_country", "Osaka", "Japan"),
        ("us_city_state", "Chicago", "Illinois"),
        ("state_capital", "Texas", "Austin"),
        ("language_code", "German", "de"),
        ("language_script", "Russian", "Cyrillic"),
        ("element_symbol", "gold", "Au"),
        ("number_element", "26", "iron"),
        ("code_city", "CDG", "Paris"),
    ],
)
def test_known_facts(atlas: Atlas, relation: str, subject: str, answer: str) -> None:
    found = [fact.object for fact in atlas.facts if (fact.relation, fact.subject) == (relation, subject)]
    assert found == [answer]


def test_templates(atlas: Atlas) -> None:
    seen = [prompt for prompts in atlas.prompts.values() for prompt in prompts]
    for relation, prompts in atlas.prompts.items():
        assert len(prompts) >= 7, relation
        assert len(set(prompts)) == len(prompts), relation
        assert sum(bool(re.fullmatch(r"Q: .*\? A:( The)?", prompt)) for prompt in prompts) == 1, relation
    for prompt in seen:
        assert prompt.count("{s}") == 1, prompt
        assert not re.search(r"\{s\}'s|  | ,|^ |[ .?!]$", prompt), prompt
        assert re.match(r"[A-Z{]", prompt), prompt


def test_records_are_valid(records: dict[str, tuple[Record, ...]]) -> None:
    for record in (record for split in SPLITS for record in records[split]):
        prompts = (record.prompt, *record.paraphrases)
        assert record.subject
        assert all(record.subject.casefold() in text.casefold() for text in prompts)
        assert len(record.paraphrases) >= 6
        assert len(set(prompts)) == len(prompts)
        assert all("  " not in text and "{" not in text and text[0].upper() == text[0] for text in prompts)
        assert record.answer
        assert record.target
        assert record.answer != record.target
        assert not record.answer.startswith(record.target)
        assert not record.target.startswith(record.answer)
        assert len(record.neighbours) == len(record.unrelated) == 4
        assert all(probe.answer != record.target for probe in record.neighbours)
        assert not {probe.prompt for probe in record.neighbours + record.unrelated} & set(prompts)
    ids = [record.id for split in SPLITS for record in records[split]]
    assert len(set(ids)) == len(ids)


def test_targets_are_answers_of_the_same_relation(
    atlas: Atlas, records: dict[str, tuple[Record, ...]]
) -> None:
    objects = {(fact.relation, fact.object) for fact in atlas.facts}
    assert all((record.relation, record.target) in objects for split in SPLITS for record in records[split])


def test_order_and_limit(records: dict[str, tuple[Record, ...]]) -> None:
    assert read_records("atlas").records == sum((records[split] for split in SPLITS), ())
    first = read_records("atlas", split="train", limit=200)
    assert first.records == records["train"][:200]
    assert first.source == "atlas"
    assert len({record.relation for record in first}) >= 20
    beyond = len(records["train"]) + 5
    assert read_records("atlas", limit=beyond).records == (records["train"] + records["validation"])[:beyond]


def test_unknown_split() -> None:
    with pytest.raises(DataError, match="no split 'dev'; choose one of train, validation, test"):
        read_records("atlas", split="dev")


def test_the_card_names_the_counts_and_sources(atlas: Atlas, records: dict[str, tuple[Record, ...]]) -> None:
    card = (ROOT / "docs" / "atlas.md").read_text(encoding="utf-8")
    for name, version in atlas.sources.items():
        assert f"| {name} | {version} |" in card
    for relation in atlas.prompts:
        counts = [sum(record.relation == relation for record in records[split]) for split in SPLITS]
        row = " | ".join(str(count) for count in (sum(counts), *counts))
        assert f"| {relation} | {row} |" in card


def test_rebuild_gives_the_same_facts(atlas: Atlas, tmp_path: Path) -> None:
    for name, version in atlas.sources.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} {version} is needed to rebuild the facts, and is not installed")
        if found != version:
            pytest.skip(f"{name} {version} is needed to rebuild the facts, and {found} is installed")
    out = tmp_path / "atlas.json.gz"
    subprocess.run([sys.executable, ROOT / "scripts" / "build_atlas.py", "--out", out], check=True)
    kept = (resources.files("emendo.data") / "atlas.json.gz").read_bytes()
    assert out.read_bytes()[4:8] == kept[4:8] == bytes(4), "no date inside"
    assert gzip.decompress(out.read_bytes()) == gzip.decompress(kept)
    assert json.loads(gzip.decompress(kept))["sources"] == atlas.sources
