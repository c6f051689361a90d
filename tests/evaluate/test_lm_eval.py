"""An exported adapter in the evaluation harness: one small local task, before and after the edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import build_lm
from emendo.edits.edit import Edit, Origin, Request
from emendo.edits.peft import to_peft
from emendo.low_rank import LowRank
from emendo.models.sites import find_sites

pytest.importorskip("lm_eval", reason="the evaluation harness is not installed: pip install emendo[lm-eval]")

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's and what it loads
def test_the_harness_sees_the_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    lm = build_lm("llama")
    lm.model.config.max_position_embeddings = 256
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    deltas = {s.name: LowRank(torch.randn(s.d_out, 4), torch.randn(4, s.d_in)) for s in find_sites(lm.model)}
    edit = Edit(deltas, Origin(lm.fingerprint, "m", "mend", {}, (Request("a", "b"),), "2025-01-31"))
    to_peft(edit, lm, tmp_path / "adapter")
    data, task = tmp_path / "data.jsonl", tmp_path / "tasks" / "capitals.yaml"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    task.parent.mkdir()
    task.write_text(TASK.format(data=data), encoding="utf-8")

    def likelihoods(more: str) -> list[list[float]]:
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={tmp_path / 'model'},dtype=float32{more}",
            tasks=["capitals"],
            task_manager=TaskManager(include_path=str(task.parent), include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
        )
        return [[choice[0][0] for choice in row["resps"]] for row in found["samples"]["capitals"]]

    def expected() -> list[list[float]]:
        from emendo.models.tokenization import to_texts

        rows = []
        for question in QUESTIONS:
            pairs = [(question["prompt"], choice) for choice in question["choices"]]
            texts = to_texts(lm, pairs)
            rows.append(
                [
                    float(
                        -torch.nn.functional.cross_entropy(logits, torch.tensor(text.labels), reduction="sum")
                    )
                    for text, logits in zip(texts, lm.logits(texts), strict=True)
                ]
            )
        return rows

    before, after = likelihoods(""), likelihoods(f",peft={tmp_path / 'adapter'}")
    torch.testing.assert_close(torch.tensor(before), torch.tensor(expected()), rtol=1e-4, atol=1e-3)
    with edit.applied(lm):
        torch.testing.assert_close(torch.tensor(after), torch.tensor(expected()), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(torch.tensor(before), torch.tensor(after), atol=0.1)
