"""Tasks of the evaluation harness before and after edits: which model is asked, and what the harness makes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import build_lm, records, unchanged
from emendo.data import Record
from emendo.editors.cache import Cache, CacheConfig
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate import evaluate, harness
from emendo.evaluate.evaluation import SequentialEvaluation
from emendo.evaluate.harness import Harness
from emendo.evaluate.run_folder import RunFolder
from emendo.evaluate.sequential import evaluate_sequence
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.report.html import render_report
from emendo.report.markdown import summary

TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"prompt": f"The capital of {name} is", "choices": ["Oslo", "Rome"], "answer": number % 2}
    for number, name in enumerate(("Bada", "Cobo", "Gude", "Fosoba", "Hilu", "Jaro"))
]


def likelihoods(lm: LM) -> list[float]:
    """Of every choice of every question, in nats."""
    texts = to_texts(lm, [(q["prompt"], choice) for q in QUESTIONS for choice in q["choices"]])  # type: ignore[attr-defined]
    return [
        float(logits.log_softmax(-1)[range(len(text.labels)), list(text.labels)].sum())
        for text, logits in zip(texts, lm.logits(texts), strict=True)
    ]


class Spoken(Harness):
    """A harness of one task whose score is the likelihood of all its choices: no lm-eval is needed."""

    def __post_init__(self) -> None:
        self.asked_of: list[str] = []

    def _found(self) -> Any:
        return None

    def _ask(self, lm: LM, side: str) -> dict[str, Any]:
        self.asked_of.append(side)
        self.rows.append({"side": side})
        with torch.no_grad():
            value = sum(likelihoods(lm))
        score = {"value": value, "stderr": 0.5, "better": 1, "questions": 6, "version": 1, "shots": 0}
        return {
            "harness": {"lm_eval": "0", "limit": None, "prompts": "bare"},
            "scores": {"capitals: acc": score},
        }


def editor(lm: LM) -> FineTuning:
    return FineTuning(find_sites(lm.model, last=1), FineTuningConfig(lr=0.01, steps=2))


def in_earnest(lm: LM, chosen: Sequence[Record], *, at_once: bool) -> LM:
    """A copy whose weights take the edits."""
    twin = LM(copy.deepcopy(lm.model), lm.tokenizer)
    wishes = [Request(record.prompt, record.target) for record in chosen]
    for group in [wishes] if at_once else [[wish] for wish in wishes]:
        for site, change in editor(twin).together(twin, group).items():
            with torch.no_grad():
                twin.model.get_submodule(site).weight += change.dense().detach()
    return twin


def test_after_a_sequence_the_model_with_all_edits_is_asked(tiny_llama: LM) -> None:
    chosen, asks = records(3), Spoken(["capitals"])
    with unchanged(tiny_llama.model):
        found = evaluate_sequence(
            tiny_llama, editor(tiny_llama), chosen, at=(1,), generated=False, harness=asks
        )
    score = found.as_dict()["lm_eval"]["scores"]["capitals: acc"]
    assert asks.asked_of == ["before", "after"]
    assert score["before"] == pytest.approx(sum(likelihoods(tiny_llama)), rel=1e-5)
    twin = in_earnest(tiny_llama, chosen, at_once=False)
    assert score["after"] == pytest.approx(sum(likelihoods(twin)), rel=1e-4)
    assert abs(score["after"] - score["before"]) > 0.1
    assert "all 3 edits" in found.harness["edits"]
    page = render_report(info={}, sequential=found)
    assert "capitals: acc" in page and "tasks of the evaluation harness" in page
    assert "| capitals: acc | " in summary(found, {}) and "± 0.5" in summary(found, {})


def test_of_several_facts_at_once_the_first_edit_is_asked(tiny_llama: LM, tmp_path: Path) -> None:
    chosen, asks = records(4), Spoken(["capitals"])
    found = evaluate(
        tiny_llama,
        editor(tiny_llama),
        chosen,
        together=2,
        generated=False,
        fact_in_context=False,
        harness=asks,
    )
    twin = in_earnest(tiny_llama, chosen[:2], at_once=True)
    score = found.harness["scores"]["capitals: acc"]
    assert score["after"] == pytest.approx(sum(likelihoods(twin)), rel=1e-4)
    assert "first edit, of 2 facts" in found.harness["edits"]
    run = RunFolder.begin(tmp_path / "run", chosen, {})
    run.finish(found, asks.rows)
    kept = RunFolder.open(tmp_path / "run")
    assert kept.found().harness == found.harness
    lines = (tmp_path / "run" / "lm-eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["side"] for line in lines] == ["before", "after"]


@pytest.mark.slow
def test_what_is_not_measured_is_said(tiny_llama: LM) -> None:
    asks = Spoken(["capitals"])
    alone = evaluate(tiny_llama, editor(tiny_llama), records(1), generated=False, harness=asks)
    cache = evaluate_sequence(tiny_llama, Cache((), CacheConfig()), records(1), generated=False, harness=asks)
    for found, why in ((alone, "edits one at a time"), (cache, "cache changes no weights")):
        said = found.as_dict()["lm_eval"]
        assert not said["scores"] and why in said["edits"] and "not measured" in said["edits"]
        assert why in summary(found, {})
        page = {"sequential": found} if isinstance(found, SequentialEvaluation) else {"evaluation": found}
        assert why in render_report(info={}, **page)  # type: ignore[arg-type]
    assert asks.asked_of == []


def test_without_the_harness_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'emendo\[lm-eval\]'"):
        Harness(["arc_easy"])
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    for wrong, message in (
        ({"tasks": [""]}, "names no task"),
        ({"tasks": ["a"], "limit": 0}, "limit=0"),
        ({"tasks": ["a"], "folder": tmp_path / "none"}, "no folder"),
    ):
        with pytest.raises(RequestError, match=message):
            Harness(**wrong)
    with pytest.raises(RequestError, match="classifier"):
        Harness(["a"]).begin(build_lm("bert"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task; its questions lie beside it."""
    pytest.importorskip(
        "lm_eval", reason="the evaluation harness is not installed: pip install emendo[lm-eval]"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data, tasks = tmp_path / "data.jsonl", tmp_path / "tasks"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    tasks.mkdir()
    (tasks / "capitals.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return tasks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's and what it loads
def test_the_harness_reads_the_edited_model(folder: Path) -> None:
    lm, chosen = build_lm("llama"), records(2)
    lm.model.config.max_position_embeddings = 256
    asks = Harness(["capitals"], None, folder)
    torch.manual_seed(5)
    wanted, _ = torch.rand(1), torch.manual_seed(5)
    with unchanged(lm.model):
        found = evaluate_sequence(lm, editor(lm), chosen, generated=False, harness=asks)
    assert torch.equal(torch.rand(1), wanted)  # the harness's seeds are its own
    twin = in_earnest(lm, chosen, at_once=False)
    for side, model in (("before", lm), ("after", twin)):
        rows = [row for row in asks.rows if row["side"] == side]
        assert [row["question"] for row in rows] == list(range(6))
        expected = torch.tensor(likelihoods(model)).view(6, 2)
        right = expected.argmax(-1) == torch.tensor([q["answer"] for q in QUESTIONS])
        score = found.harness["scores"]["capitals: acc"]
        assert score[side] == pytest.approx(float(right.float().mean()))
        assert [row["acc"] for row in rows] == right.float().tolist()
    assert score["questions"] == 6 and score["better"] == 1 and score["before_stderr"] > 0
    fewer = Harness(["capitals"], 2, folder)
    assert (
        evaluate_sequence(lm, editor(lm), chosen, generated=False, harness=fewer).harness["scores"][
            "capitals: acc"
        ]["questions"]
        == 2
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_named(folder: Path, tiny_llama: LM) -> None:
    with pytest.raises(RequestError, match="no task rivers_of_nowhere"):
        Harness(["capitals", "rivers_of_nowhere"], None, folder).begin(tiny_llama)
