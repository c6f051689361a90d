"""Tasks: the right records in the right part, probes that the model knows, and files that are not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from reproduction.mend_paper import passages, tasks
from reproduction.mend_paper.facts import CLASSES, as_claims, claims, known, with_known_probes, wordings
from reproduction.mend_paper.passages import continuations, read_passages, sample

from emendo.data.schema import Record
from emendo.errors import DataError, RequestError
from emendo.models.lm import LM
from emendo.progress import SILENT

WORDS = (
    "The red fox crosses a wide river near the old mill while rain falls on every roof of that town".split()
)


def wikitext(folder: Path, paragraphs: int = 12) -> Path:
    lines = [" = A heading = ", " ", " short . "]
    for i in range(paragraphs):
        words = [f"{word}{i}" if at % 5 == 0 else word for at, word in enumerate(WORDS * 3)]
        lines.append(f" Rare <unk> {' '.join(words)} , 2 @.@ 5 km of a well @-@ known <unk> end . ")
    path = folder / "wikitext2-valid.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def counterfact(number: int) -> dict[str, object]:
    return {
        "case_id": number,
        "prompt": f"The tongue of Person {number} is",
        "target_new": "English",
        "subject": f"Person {number}",
        "ground_truth": "French",
        "rephrase_prompt": f"Person {number} speaks",
        "locality_prompt": "Person X speaks",
        "locality_ground_truth": "Dutch",
    }


def zsre(number: int) -> dict[str, object]:
    texts = {"subject": "S", "src": f"Who is {number}?", "rephrase": "Who?", "loc": "Why?", "loc_ans": "So"}
    return {**texts, "alt": "" if number == 3 else "nobody", "answers": ["you"]}


def dump(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(records), encoding="utf-8")


class TestFiles:
    def test_counterfact_validates_on_the_end_of_the_training_file(self, tmp_path: Path) -> None:
        dump(tmp_path / "counterfact-train.json", [counterfact(i) for i in range(210)])
        dump(tmp_path / "counterfact-dev.json", [counterfact(i) for i in range(900, 903)])
        task = tasks.task("counterfact", data=tmp_path)
        assert (task.name, task.model, task.kind) == ("counterfact", "smollm2-135m", "qa")
        assert [len(part) for part in (task.train, task.validation, task.test)] == [10, 200, 3]
        assert task.validation[0].id == "10" and task.test[0].id == "900"

    def test_zsre_leaves_bad_records_out(self, tmp_path: Path) -> None:
        dump(tmp_path / "zsre-mend-dev.json", [zsre(i) for i in range(521)])
        task = tasks.task("zsre", data=tmp_path)
        assert [len(part) for part in (task.train, task.validation, task.test)] == [450, 50, 20]
        assert "1 bad record" in task.note

    @pytest.mark.parametrize("name", ["counterfact", "zsre", "wikitext"])
    def test_a_missing_file_is_named_with_its_layout(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no data folder was given; give a folder with that file: .{20}"):
            tasks.task(name)
        with pytest.raises(DataError, match="does not hold it"):
            tasks.task(name, data=tmp_path)

    def test_an_unknown_name(self) -> None:
        with pytest.raises(
            RequestError, match="no task 'nope'; choose one of counterfact, counterfact-text, zsre"
        ):
            tasks.task("nope")


class TestFacts:
    def test_built_in(self) -> None:
        task = tasks.task("atlas")
        assert len(task.train) > len(task.validation) > 0 and task.test == known("test", (0, len(task.test)))

    def test_probes_are_known_facts_in_learned_wordings(self) -> None:
        pool = known("test", (0, 60))
        asked = {(text, record.answer) for record in pool for text in wordings(record)[:-1]}
        found = with_known_probes(pool, pool)
        assert found == with_known_probes(pool, pool)  # no chance in it
        for fact, record in zip(pool, found, strict=True):
            assert (record.prompt, *record.paraphrases) == wordings(fact)[:-1]
            probes = (*record.neighbours, *record.unrelated)
            assert asked >= {(probe.prompt, probe.answer) for probe in probes}
            assert len(record.unrelated) == 2 and record.subject is not None
            assert not any(record.subject in probe.prompt.split() for probe in probes)

    def test_neighbours_share_the_relation(self) -> None:
        pool = known("test", (0, 60))
        relation = {text: record.relation for record in pool for text in wordings(record)}
        for record in with_known_probes(pool, pool):
            assert {relation[probe.prompt] for probe in record.neighbours} <= {record.relation}
            assert record.relation not in {relation[probe.prompt] for probe in record.unrelated}

    def test_claims_are_turned_around(self) -> None:
        pool = known("test", (0, 60))
        found = as_claims(pool, pool)
        assert 15 < sum(record.answer == "true" for record in found) < 45
        for fact, record in zip(pool, found, strict=True):
            truth = CLASSES.index(str(record.answer))
            assert record.target == CLASSES[1 - truth]
            texts = [claims(fact, number)[truth] for number in range(len(wordings(fact)))]
            assert [record.prompt, *record.paraphrases] == texts
            for probes in (record.neighbours, record.unrelated):
                assert len(probes) < 2 or {probe.answer for probe in probes} == set(CLASSES)

    def test_claim_probes_carry_their_gold_class(self) -> None:
        pool = known("test", (0, 40))
        gold = {
            claim: name
            for fact in pool
            for number in range(len(wordings(fact)))
            for claim, name in zip(claims(fact, number), CLASSES, strict=True)
        }
        for record in as_claims(pool, pool):
            assert all(gold[p.prompt] == p.answer for p in (*record.neighbours, *record.unrelated))

    @pytest.mark.parametrize("name", ["atlas-t5", "atlas-bart", "atlas-bert"])
    def test_tasks_of_the_zoo(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "known", lambda split: known(split, (130, 40)))
        task = tasks.task(name)
        assert task.model == name and task.kind == ("fact-checking" if name == "atlas-bert" else "qa")
        assert [len(part) for part in (task.train, task.validation, task.test)] == [30, 100, 40]
        ids = [{record.id for record in part} for part in (task.train, task.validation, task.test)]
        assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])


class TestPassages:
    def test_paragraphs_serve_once_and_read_as_usual(self, tmp_path: Path) -> None:
        found = read_passages(wikitext(tmp_path), train=4, test=3)
        assert (len(found.train), len(found.test), len(found.prompts)) == (4, 3, 5)
        starts = {text[:60] for text in (*found.train, *found.test, *found.prompts)}
        assert len(starts) == 12
        for text in found.train:
            assert "<unk>" not in text and text.endswith(", 2.5 km of a well-known")
        assert all(20 <= len(text.split()) <= 40 for text in found.prompts)

    def test_a_broken_file(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(DataError, match="one paragraph a line"):
            read_passages(tmp_path / "text")

    def test_continuations_are_clean_and_new(self, tmp_path: Path, tiny_gpt2: LM) -> None:
        prompts = [" ".join(text.split()[:7]) for text in read_passages(wikitext(tmp_path, 30), 0, 0).prompts]
        found = list(sample(tiny_gpt2, prompts))
        assert found
        for record in found:
            whole = tiny_gpt2.tokenizer(f"{record.prompt} {record.target}")["input_ids"]
            bare = tiny_gpt2.tokenizer(record.prompt)["input_ids"]
            assert whole[: len(bare)] == bare and len(whole) == len(bare) + 10
            assert record.target == record.target.strip() and record.target[0].isalnum()
            assert all(record.prompt.endswith(text) for text in record.paraphrases)
            assert all(len(text.split()) * 2 >= len(record.prompt.split()) for text in record.paraphrases)

    def test_they_are_sampled_once(
        self, tmp_path: Path, tiny_gpt2: LM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
        record = Record("a b c", "d", id="1", paraphrases=("b c",))
        monkeypatch.setattr(passages, "sample", lambda lm, prompts: (replace(record, id=p) for p in prompts))
        loaded = []

        def load() -> LM:
            loaded.append(1)
            return tiny_gpt2

        first = continuations(("x", "y", "z"), 2, load, "tiny", SILENT)
        assert continuations(("x", "y", "z"), 2, load, "tiny", SILENT) == first
        assert [found.id for found in first] == ["x", "y"] and len(loaded) == 1
        with pytest.raises(DataError, match="Only 3 of 3 passages"):
            continuations(("x", "y", "z"), 4, load, "tiny", SILENT)

    def test_the_task(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wikitext(tmp_path, 500)
        made = tuple(Record(f"p{i}", "t") for i in range(700))
        monkeypatch.setattr(tasks, "continuations", lambda prompts, count, *rest: made[:count])
        task = tasks.task("wikitext", data=tmp_path)
        assert [len(part) for part in (task.train, task.validation, task.test)] == [500, 50, 150]
        assert len(task.passages) == 300 and len(task.test_passages) == 150
        assert not set(task.passages) & set(task.test_passages)
