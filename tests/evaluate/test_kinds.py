"""Evaluation and the before/after table for every kind of model and edit, against one edit and one pass at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import pytest
import torch

from cases import build_lm, records_for, unchanged
from emendo.data import Record
from emendo.editors import Editor
from emendo.editors.cache import Cache, CacheConfig
from emendo.editors.in_context import InContext
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Edit
from emendo.errors import MismatchError
from emendo.evaluate import Answer, Question, Row, before_after, evaluate, questions
from emendo.evaluate.metrics import answer_match, same_answer
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts

CASES = [("t5", "mend"), ("bert", "mend"), ("bart", "cache"), ("gpt2", "in-context")]
MORE = [("bart", "mend"), ("llama", "cache"), ("bert", "cache"), ("t5", "in-context")]
EVERY = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
"""Each method and each kind of model once; the other pairs are in the slow suite."""


def editor_for(lm: LM, name: str) -> Editor:
    if name == "cache":
        return Cache((), CacheConfig(radius=4 if lm.kind == "classifier" else 3))
    if name == "in-context":
        return InContext(())
    torch.manual_seed(0)
    return Mend(find_sites(lm.model, last=2), MendConfig(rank=4, alpha=0.3, norm=False)).eval()


def some(lm: LM, n: int) -> list[Record]:
    return [
        dataclasses.replace(
            r, paraphrases=r.paraphrases[:1], neighbours=r.neighbours[:1], unrelated=r.unrelated[:1]
        )
        for r in records_for(lm, n)
    ]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_evaluation_equals_one_edit_and_one_prompt_at_a_time(kind: str, name: str) -> None:
    lm = build_lm(kind)
    editor, chosen = editor_for(lm, name), some(lm, 2)
    with unchanged(lm.model):
        found = evaluate(lm, editor, chosen, new_tokens=2)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (plain["rank"] > 0, plain["relative_norm"] > 0) == (name == "mend", name == "mend")
    assert plain["seconds_per_edit"] > 0
    changed = False
    for result in found.results:
        edit = editor.edit(lm, result.record.prompt, result.record.target)
        for outcome in result.outcomes:
            (text,) = to_texts(lm, [(outcome.prompt, outcome.answer)])
            labels = torch.tensor(text.labels)
            (before,), clean = lm.logits([text]), lm.generate(outcome.prompt, 2)
            with edit.applied(lm) as edited:
                (after,), slow = edited.logits([text]), edited.generate(outcome.prompt, 2)
            local = outcome.kind in ("neighbour", "unrelated", "told")
            right = after.argmax(-1) == (before.argmax(-1) if local else labels)
            assert outcome.teacher_forced == bool(right.all())
            assert outcome.token_level == pytest.approx(float(right.float().mean()))
            for rows, probability in ((before, outcome.before), (after, outcome.after)):
                exact = float(rows.log_softmax(-1)[range(len(labels)), labels].sum().exp())
                assert probability == pytest.approx(exact, rel=2e-3, abs=1e-7)
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            kl = float((p.exp() * (p - q)).sum(-1).mean())
            assert outcome.kl == pytest.approx(kl, rel=2e-3, abs=1e-5)
            if outcome.other is not None:
                (text,) = to_texts(lm, [(outcome.prompt, outcome.other)])
                with edit.applied(lm) as edited:
                    (rows,) = edited.logits([text])
                logs = rows.log_softmax(-1)[range(len(text.labels)), list(text.labels)]
                assert outcome.other_nll_after == pytest.approx(-float(logs.mean()), rel=2e-3, abs=1e-5)
            if outcome.kind == "told":
                continue
            assert outcome.text_after == slow
            assert outcome.text_before == (None if outcome.kind == "paraphrase" else clean)
            same = same_answer(clean, slow, outcome.answer) if local else answer_match(slow, outcome.answer)
            assert outcome.generated == same
            changed |= kl > 0.01
    assert changed


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_rows_equal_plain_passes(kind: str, name: str) -> None:
    lm = build_lm(kind)
    (record,) = some(lm, 1)
    edit = editor_for(lm, name).edit(lm, record.prompt, record.target)
    asked = questions(record, paraphrases=1, neighbours=1)
    with unchanged(lm.model):
        rows = before_after(lm, edit, asked, k=4)
    tops = [check(lm, row, row.before, row.target_before) for row in rows]
    with edit.applied(lm) as edited:
        for row, top in zip(rows, tops, strict=True):
            assert row.changed == (top != check(edited, row, row.after, row.target_after))
            (text,) = to_texts(lm, [(row.prompt, row.target)])
            assert row.reached == (edited.logits([text])[0].argmax(-1).tolist() == list(text.labels))
    if name == "cache":
        assert rows[0].reached and rows[0].after[0].text == record.target
        assert rows[0].target_after > 0.999


def check(lm: LM, row: Row, answers: Sequence[Answer], probability: float) -> int:
    """One side of a row against the model itself, one prompt at a time; gives the likeliest token."""
    (text,) = to_texts(lm, [(row.prompt, row.target)])
    (logits,), top = lm.logits([text]), lm.top(row.prompt, 4)
    logs = [float(line[label]) for line, label in zip(logits.log_softmax(-1), text.labels, strict=True)]
    assert probability == pytest.approx(math.exp(sum(logs)), rel=1e-3, abs=1e-7)
    assert answers[0].probability == pytest.approx(top[0][1], rel=1e-3)
    for answer in answers:
        assert any(answer.probability == pytest.approx(value, rel=1e-3) for _, value in top)
    if lm.kind == "classifier":
        assert [answer.text for answer in answers] == [label for label, value in top if value > 1e-6]
    elif (words := lm.generate(row.prompt, 8).split()) and words[0].isalpha():
        assert answers[0].text in (row.target, row.answer) or words[0].startswith(answers[0].text)
    return int(lm.next_logits([row.prompt])[0].argmax())


def test_an_edit_of_another_model_than_the_one_it_is_compared_with(tiny_llama: LM) -> None:
    """ENN: the edit is of a trained copy; before it the user's own model answers."""
    host = build_lm("llama", seed=1)
    edit = editor_for(host, "mend").edit(host, "The capital of Bade is", "Rome")
    assert isinstance(edit, Edit)
    asked = [Question("edit", "The capital of Bade is"), Question("neighbour", "Two and two are")]
    with pytest.raises(MismatchError):
        before_after(tiny_llama, edit, asked)
    mixed = before_after(tiny_llama, edit, asked, host=host)
    assert [row.before for row in mixed] == [
        row.before for row in before_after(tiny_llama, _of(tiny_llama), asked)
    ]
    assert [row.after for row in mixed] == [row.after for row in before_after(host, edit, asked)]


def _of(lm: LM) -> Edit:
    edit = editor_for(lm, "mend").edit(lm, "The capital of Bade is", "Rome")
    assert isinstance(edit, Edit)
    return edit
