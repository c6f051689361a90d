"""What the guard measures, against plain passes through the model, and what it lets pass."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from cases import build_lm
from emendo.edits.edit import Edit, Origin, Request
from emendo.errors import DataError, RequestError
from emendo.ledger.guard import largest_norm, targets_reached
from emendo.ledger.health import Drift, Health, Limits
from emendo.ledger.probes import ProbeRunner, Probes, built_in_prompts, read_prompts
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts

FINE = Health(1.0, 1.0, 0.0, 0.0, 1.0, 0.01, 0.0, 0.0, 1.0)
PROMPTS = (("The capital of Bada is", "Oslo"), ("A river in", ""), ("The capital of Gude is", "New Town"))
PASSAGE = "Bread is made from flour. " * 4


def a_change(lm: LM, size: float = 0.3) -> Edit:
    deltas = {
        s.name: LowRank(size * torch.randn(s.d_out, 2), torch.randn(2, s.d_in)) for s in find_sites(lm.model)
    }
    origin = Origin(
        lm.fingerprint, lm.name, "mend", {}, (Request("The capital of Bada is", "Oslo"),), "2025-01-31"
    )
    return Edit(deltas, origin)


@pytest.mark.parametrize("kind", ["llama", "bart", "bert"])
def test_drift_against_plain_passes(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    edit, runner = a_change(lm), ProbeRunner(lm, Probes(PROMPTS, PASSAGE))
    before = runner.run()
    with edit.applied(lm):
        after = runner.run()
    found = after.drift(before)
    kls, changed = [], []
    for prompt, answer in PROMPTS:
        text = (
            to_texts(lm, [(prompt, answer)])[0] if answer and kind != "bert" else lm.prompt_texts([prompt])[0]
        )
        old = lm.logits([text])[0].log_softmax(-1)
        with edit.applied(lm):
            new = lm.logits([text])[0].log_softmax(-1)
        kls.append(float((old.exp() * (old - new)).sum(-1).mean()))
        changed.append(bool((old.argmax(-1) != new.argmax(-1)).any()))
    assert found.kl == pytest.approx(sum(kls) / 3, rel=1e-9)
    assert found.kl > 0
    assert found.changed == sum(changed) / 3
    if kind != "llama":
        assert found.perplexity is None
        return
    ids = torch.tensor([lm.tokenizer(PASSAGE)["input_ids"][: lm.context]])
    old_loss = float(lm.model(ids, labels=ids).loss)
    with edit.applied(lm), torch.no_grad():
        new_loss = float(lm.model(ids, labels=ids).loss)
    assert found.perplexity == pytest.approx(
        math.exp(new_loss - old_loss), rel=1e-6
    )  # transformers' loss is float32
    assert after.drift(after) == Drift(0.0, 0.0, 1.0)


def test_prompts_that_an_edit_was_asked_to_change_do_not_count(tiny_llama: LM) -> None:
    runner = ProbeRunner(tiny_llama, Probes(PROMPTS, ""))
    before = runner.run()
    with a_change(tiny_llama, 3.0).applied(tiny_llama):
        after = runner.run()
    assert after.drift(before).perplexity is None
    whole, part = after.drift(before), after.drift(before, {PROMPTS[0][0], PROMPTS[2][0]})
    assert part.kl != whole.kl
    assert part.changed in (0.0, 1.0)
    assert after.drift(before, {prompt for prompt, _ in PROMPTS}) == Drift(0.0, 0.0, None)


def test_reached_is_the_argmax_of_every_token(tiny_llama: LM) -> None:
    said = tiny_llama.generate("The capital of Bada is", 1)
    for target in ("Oslo", "New Town", said):
        if not target.strip():
            continue
        text = to_texts(tiny_llama, [("The capital of Bada is", target)])[0]
        logits = tiny_llama.model(torch.tensor([text.inputs])).logits[0, text.start - 1 :]
        expected = logits.argmax(-1).tolist() == list(text.labels)
        assert targets_reached(tiny_llama, [("The capital of Bada is", target)]) == [expected]
    assert targets_reached(tiny_llama, []) == []


def test_the_largest_norm(tiny_gpt2: LM) -> None:
    edit = a_change(tiny_gpt2)
    expected = max(
        float(edit.deltas[s.name].dense().norm() / s.weight(tiny_gpt2.model).norm())
        for s in find_sites(tiny_gpt2.model)
    )
    assert largest_norm(edit, tiny_gpt2) == pytest.approx(expected, rel=1e-4)


def test_a_healthy_edit_passes() -> None:
    assert FINE.problems(Limits()) == []
    assert (
        replace(FINE, paraphrase_success=None, perplexity=None, total_perplexity=None).problems(Limits())
        == []
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Health)])
def test_every_figure_can_refuse(name: str) -> None:
    limit = getattr(Limits(), name)
    worse = limit - 0.01 if name in ("edit_success", "paraphrase_success") else limit + 0.01
    (problem,) = replace(FINE, **{name: worse}).problems(Limits())
    assert f"{limit:g}" in problem
    assert replace(FINE, **{name: limit}).problems(Limits()) == []
    assert replace(FINE, **{name: float("nan")}).problems(Limits()) != []


def test_limits_are_named_like_the_figures_and_not_negative() -> None:
    assert list(asdict(Limits())) == list(asdict(FINE)) == [field.name for field in fields(Limits)]
    with pytest.raises(RequestError, match="negative"):
        Limits(kl=-0.1)
    with pytest.raises(RequestError, match="negative"):
        Limits(kl=float("nan"))


def test_the_built_in_prompts() -> None:
    prompts = built_in_prompts()
    assert len(prompts) == 32
    assert all(prompt.strip() and answer.strip() for prompt, answer in prompts)
    assert built_in_prompts() == prompts


def test_a_users_own_prompts(tmp_path: Path) -> None:
    file = tmp_path / "probes"
    file.write_text(
        'One day \n\n{"prompt": "Two", "answer": "three"}\n{"prompt": "Four"}\n', encoding="utf-8"
    )
    assert read_prompts(file) == (("One day ", ""), ("Two", "three"), ("Four", ""))


@pytest.mark.parametrize("line", ['{"answer": "x"}', '{"prompt": 3}', '{"prompt": " "}', "{not json"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "probes"
    file.write_text(f"fine\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"probes:2: expected a prompt"):
        read_prompts(file)


def test_an_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "probes").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="no prompt in it"):
        read_prompts(tmp_path / "probes")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "nothing")
