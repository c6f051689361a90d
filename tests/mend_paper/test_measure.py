"""Measures against a naive loop: one edit at a time, dense weights, one text in a full pass, Python sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
import torch
from reproduction.mend_paper.figures import PROTOCOL, figures
from reproduction.mend_paper.measure import PASSAGE_TOKENS, PASSAGES, measure
from torch import Tensor

from cases import Recorded, build_lm, in_slow_suite, plain_logits, records_for, unchanged
from emendo.data import Record
from emendo.editors import Editor
from emendo.editors.enn import Enn, EnnConfig
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate.intervals import mean_interval
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import passage_texts, to_texts

PROSE = [
    "The capital of Bade is Paris and the main city of Foka is called Rome.",
    "Water is made of hydrogen and oxygen.",
    "Two and two are four, and the capital of Lima is Old Town; Oslo is another.",
    "x",
    "Cairo's capital is New Port, as the main city of Risotu is called Oslo in the capital.",
    "And so it is.",
]


def mend(lm: LM) -> Mend:
    editor = Mend(find_sites(lm.model), MendConfig(rank=4, alpha=0.03), lm.fingerprint)
    return editor.eval()


def enn(lm: LM) -> Enn:
    """One whose training moved the model."""
    editor = Enn(find_sites(lm.model), EnnConfig(inner_lr=0.03), lm.fingerprint)
    editor.bind(lm)
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return editor.eval()


class Slow:
    """The reference."""

    def __init__(self, lm: LM, editor: Editor) -> None:
        self.lm, self.editor = lm, editor
        self.original, self.host = lm.model, editor.host(lm).model

    @torch.no_grad()
    def edited(self, group: Sequence[Record]) -> Any:
        model = copy.deepcopy(self.host)
        for record in group:
            changes = self.editor.each(self.lm, [Request(record.prompt, record.target)])
            for name, change in changes.items():
                weight, dense = model.get_submodule(name).weight, change.dense()[0]
                weight += dense if weight.shape == dense.shape else dense.T
        return model

    @torch.no_grad()
    def rows(self, model: Any, text: Text) -> Tensor:
        return plain_logits(model, collate([text])).log_softmax(-1)

    def right(self, model: Any, prompt: str, answer: str) -> bool:
        (text,) = to_texts(self.lm, [(prompt, answer)])
        return self.rows(model, text).argmax(-1).tolist() == list(text.labels)


@pytest.mark.parametrize(
    ("kind", "make", "k"),
    [
        ("gpt2", mend, 1),
        pytest.param("gpt2", enn, 2, marks=pytest.mark.slow),
        pytest.param("t5", mend, 2, marks=pytest.mark.slow),
        pytest.param("t5", enn, 1, marks=pytest.mark.slow),
        pytest.param("bert", mend, 1, marks=pytest.mark.slow),
        ("bert", enn, 2),
    ],
)
def test_figures_of_prompts(kind: str, make: Any, k: int) -> None:
    lm = build_lm(kind)
    editor, facts = make(lm), records_for(lm, 3)
    with unchanged(lm.model):
        found = figures(measure(lm, editor, facts, k=k))
    slow, facts = Slow(lm, editor), facts[: 3 // k * k]
    hits, before, after, hosted, same, kl, drift, kept, worse = [], [], [], [], [], [], [], [], []
    lost: dict[bool, list[int]] = {True: [], False: []}
    for at, record in enumerate(facts):
        model = slow.edited(facts[at // k * k : at // k * k + k])
        hits.append([slow.right(model, p, record.target) for p in (record.prompt, *record.paraphrases)])
        for probe in (*record.neighbours, *record.unrelated):
            (text,) = to_texts(lm, [(probe.prompt, probe.answer)])
            was, now = slow.rows(slow.original, text), slow.rows(model, text)
            before.append(slow.right(slow.original, probe.prompt, probe.answer))
            hosted.append(slow.right(slow.host, probe.prompt, probe.answer))
            after.append(slow.right(model, probe.prompt, probe.answer))
            lost[probe in record.neighbours].append(before[-1] - after[-1])
            same.append(was.argmax(-1).equal(now.argmax(-1)))
            kl.append(float((was.exp() * (was - now)).sum(-1).mean()))
            host = slow.rows(slow.host, text)
            drift.append(float((was.exp() * (was - host)).sum(-1).mean()))
            kept.append(was.argmax(-1).equal(host.argmax(-1)))
            worse.append(fmean(float(was[i, t] - host[i, t]) for i, t in enumerate(text.labels)))
    assert found["edit_success"] == mean_interval([fmean(row) for row in hits])
    assert found["success"] == mean_interval([float(row[0]) for row in hits])
    assert found["generalisation"] == mean_interval([fmean(row[1:]) for row in hits])
    expected = {
        "accuracy_before": fmean(before),
        "accuracy_after": fmean(after),
        "accuracy_drawdown": fmean(before) - fmean(after),
        "accuracy_drawdown_near": fmean(lost[True]),
        "accuracy_drawdown_far": fmean(lost[False]),
        "unchanged": fmean(same),
        "locality_kl": fmean(kl),
    }
    if make is enn:
        expected |= {
            "accuracy_drawdown_of_host": fmean(hosted) - fmean(after),
            "accuracy_drift": fmean(before) - fmean(hosted),
            "drift_kl": fmean(drift),
            "drift_unchanged": fmean(kept),
            "drift_task_loss": fmean(worse),
        }
    for name, value in expected.items():
        assert found[name].mean == pytest.approx(value, rel=2e-3, abs=1e-6), name
        assert found[name].low <= found[name].mean <= found[name].high
    assert ("drift_kl" in found) == (make is enn)
    assert not any("perplexity" in name for name in found)
    assert 0 < fmean(kl) < math.inf  # the edits did something
    assert {name for name in found if name not in PROTOCOL} <= {"accuracy_before", "accuracy_after"}


@pytest.mark.parametrize("make", [mend, *in_slow_suite(enn)])
def test_figures_of_passages(make: Any) -> None:
    lm = build_lm("llama")
    editor, facts = make(lm), [Record(r.prompt, r.target) for r in records_for(lm, 3)]
    found = figures(measure(lm, editor, facts, PROSE))
    slow, texts = Slow(lm, editor), passage_texts(lm, PROSE, PASSAGE_TOKENS)
    assert [len(text.labels) for text in texts] == [
        len(lm.tokenizer(text).input_ids) - 1 for text in PROSE if text != "x"
    ]
    nll: dict[str, list[float]] = {"before": [], "after": [], "host": []}
    kl, same = [], []
    for fact, record in enumerate(facts):
        models = {"before": slow.original, "after": slow.edited([record]), "host": slow.host}
        for i in range(PASSAGES):
            text = texts[(PASSAGES * fact + i) % len(texts)]
            rows = {name: slow.rows(model, text) for name, model in models.items()}
            for name, row in rows.items():
                nll[name] += [-float(row[at, label]) for at, label in enumerate(text.labels)]
            was, now = rows["before"], rows["after"]
            kl += (was.exp() * (was - now)).sum(-1).tolist()
            same += was.argmax(-1).eq(now.argmax(-1)).tolist()
    value = {name: math.exp(fmean(row)) for name, row in nll.items()}
    expected = {
        "perplexity_before": value["before"],
        "perplexity_after": value["after"],
        "perplexity_drawdown": value["after"] - value["before"],
        "locality_kl": fmean(kl),
        "unchanged": fmean(same),
    }
    if make is enn:
        expected |= {
            "perplexity_drawdown_of_host": value["after"] - value["host"],
            "perplexity_drift": value["host"] - value["before"],
            "drift_task_loss": fmean(nll["host"]) - fmean(nll["before"]),
        }
    for name, number in expected.items():
        assert found[name].mean == pytest.approx(number, rel=1e-3, abs=1e-3 * value["before"]), name
    assert "accuracy_drawdown" not in found
    assert "generalisation" not in found
    assert found["edit_success"] == found["success"]


def test_rank_and_size_of_an_edit() -> None:
    lm = build_lm("gpt2")
    editor, facts = mend(lm), records_for(lm, 2)
    found = figures(measure(lm, editor, facts))
    ranks, norms = [], []
    for record in facts:
        edit = editor.edit(lm, record.prompt, record.target)
        ranks.append(
            max(int((d.left.ne(0).any(0) & d.right.ne(0).any(1)).sum()) for d in edit.deltas.values())
        )
        norms.append(fmean(edit.relative_norms(lm).values()))
    assert found["rank"].mean == fmean(ranks)
    assert found["relative_norm"].mean == pytest.approx(fmean(norms), rel=1e-4)
    assert found["seconds_per_edit"].mean > 0


def test_the_order_of_work_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """More facts than one batch of edits, more labels than one part: each fact's sums are those it has alone."""
    monkeypatch.setattr("reproduction.mend_paper.measure.EDITS", 3)
    monkeypatch.setattr("emendo.evaluate.edited_models.FORCED_TOKENS", 40)
    lm = build_lm("llama")
    editor, facts = mend(lm), records_for(lm, 5)
    together = measure(lm, editor, facts).facts
    for at in (0, 2, 3):
        (alone,) = measure(lm, editor, [facts[at]]).facts
        assert alone.keys() == together[at].keys()
        for name, value in alone.items():
            assert together[at][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reproduction.mend_paper.measure.EDITS", 4)
    lm, progress = build_lm("llama"), Recorded()
    measure(lm, mend(lm), records_for(lm, 7), k=2, progress=progress)
    assert progress.updates == [("edits", 2, 3), ("edits", 3, 3)]


def test_what_cannot_be_measured_is_refused() -> None:
    lm = build_lm("bert")
    with pytest.raises(RequestError, match="k=3 facts make one edit, but there are 2 records"):
        measure(lm, mend(lm), records_for(lm, 2), k=3)
    with pytest.raises(RequestError, match="tiny-bert continues no texts"):
        measure(lm, mend(lm), records_for(lm, 2), PROSE)
