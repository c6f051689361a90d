"""The before/after table against plain passes of the clean and the densely edited model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cases import build_lm, records
from emendo.editors.mend import Mend, MendConfig
from emendo.errors import MismatchError, RequestError
from emendo.evaluate import Question, before_after, questions
from emendo.evaluate.before_after import _is_whole, _word
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from evaluate.reference import continued, edited, forced


def mend(lm: LM) -> Mend:
    return Mend(find_sites(lm.model, last=2), MendConfig(rank=4, alpha=0.3, norm=False)).eval()


@pytest.mark.parametrize(
    ("kind", "bos"), [("gpt2", True), pytest.param("llama", False, marks=pytest.mark.slow)]
)
def test_rows_equal_plain_passes(kind: str, bos: bool) -> None:
    lm = build_lm(kind, bos=bos)
    [record] = records(1)
    edit = mend(lm).edit(lm, record.prompt, record.target)
    models = (lm.model, edited(lm, edit.deltas))
    asked = questions(record)
    rows = before_after(lm, edit, asked, k=4)
    phrases = [record.target, *(question.answer for question in asked if question.answer)]
    longest = max(4, *map(len, lm.tokenizer(phrases, add_special_tokens=False)["input_ids"]))
    assert [(row.kind, row.prompt, row.target, row.answer) for row in rows] == [
        (question.kind, question.prompt, record.target, question.answer) for question in asked
    ]
    for row in rows:
        tops = []
        for model, answers, probability in zip(
            models, (row.before, row.after), (row.target_before, row.target_after), strict=True
        ):
            with torch.no_grad():
                ids = lm.tokenizer(row.prompt, return_tensors="pt")["input_ids"]
                values, tokens = model(ids).logits[0, -1].softmax(-1).topk(4)
            tops.append(int(tokens[0]))
            likely = [float(value) for value in values]
            assert answers[0].probability == pytest.approx(likely[0], rel=1e-3)
            assert all(min(abs(a.probability - value) for value in likely) < 1e-4 for a in answers)
            known = [row.target, *([row.answer] if row.answer else [])]
            texts = [
                continued(lm, model, [*ids[0].tolist(), token], longest, shown=1) for token in tokens.tolist()
            ]
            assert [answer.text for answer in answers] == list(dict.fromkeys(_word(t, known) for t in texts))
            logits, labels = forced(lm, model, row.prompt, row.target)
            logs = [float(line[label]) for line, label in zip(logits.log_softmax(-1), labels, strict=True)]
            assert probability == pytest.approx(math.exp(sum(logs)), rel=1e-3, abs=1e-8)
        assert row.reached == (logits.argmax(-1).tolist() == labels)
        assert row.changed == (tops[0] != tops[1])
    assert any(row.changed for row in rows)


def test_questions_of_a_record() -> None:
    [record] = records(1)
    asked = questions(record, paraphrases=1, neighbours=1, unrelated=0)
    assert [question.kind for question in asked] == ["edit", "paraphrase", "neighbour"]
    assert [question.answer for question in asked] == [
        record.answer,
        record.answer,
        record.neighbours[0].answer,
    ]


def test_the_target_comes_from_the_edit_where_none_is_given(tiny_llama: LM) -> None:
    edit = mend(tiny_llama).edit(tiny_llama, "The capital of Bade is", "Rome")
    [row] = before_after(tiny_llama, edit, [Question("edit", "The capital of Bade is")])
    assert row.target == "Rome"
    assert row.answer is None
    assert before_after(tiny_llama, edit, []) == []


def test_an_edit_of_nothing_changes_no_row(tiny_llama: LM) -> None:
    [record] = records(1)
    edit = mend(tiny_llama).edit(tiny_llama, record.prompt, record.target)
    none = dataclasses.replace(edit, deltas={name: delta.scale(0) for name, delta in edit.deltas.items()})
    for row in before_after(tiny_llama, none, questions(record)):
        assert not row.changed
        assert [answer.text for answer in row.before] == [answer.text for answer in row.after]
        assert row.target_before == pytest.approx(row.target_after)


def test_a_prompt_that_fills_the_context(tiny_gpt2: LM) -> None:
    edit = mend(tiny_gpt2).edit(tiny_gpt2, "The capital of Bade is", "Rome")
    prompt = "The capital of Bade is"
    while len(tiny_gpt2.tokenizer("x " + prompt + " Rome")["input_ids"]) <= 96:  # the tiny models' context
        prompt = "x " + prompt
    [row] = before_after(tiny_gpt2, edit, [Question("edit", prompt)])
    assert row.before
    with pytest.raises(RequestError, match="context"):
        before_after(tiny_gpt2, edit, [Question("edit", prompt * 2)])


def test_an_edit_of_another_model_is_refused(tiny_llama: LM, tiny_gpt2: LM) -> None:
    edit = mend(tiny_llama).edit(tiny_llama, "The capital of Bade is", "Rome")
    with pytest.raises(MismatchError):
        before_after(tiny_gpt2, edit, [Question("edit", "The capital of Bade is")])


@pytest.mark.parametrize(
    ("text", "known", "whole"),
    [
        (" Paris", [], False),
        (" Paris,", [], False),
        (" Paris is", [], True),
        ("\n", [], True),
        (" New ", ["New York"], False),
        (" New Yor", ["New York"], False),
        (" New York", ["New York"], False),
        (" New York is", ["New York"], True),
        (" New Yorkers", ["New York"], True),
        ("\n\n", ["New York"], False),
        (" ", [], False),
    ],
)
def test_when_a_word_is_whole(text: str, known: list[str], whole: bool) -> None:
    assert _is_whole(text, known) == whole
    if whole:
        assert len({_word(text + more, known) for more in ("", " is", "ers", "\n", " York", "?")}) == 1


@pytest.mark.parametrize(
    ("text", "known", "shown"),
    [
        (" Paris, the capital", [], "Paris"),
        (" New York City is", ["New York"], "New York"),
        (" New Yorkers", ["New York"], "New"),
        (" new york", ["New York"], "new"),
        ("\n\nParis", [], "↵"),
        (" ", [], "␣"),
        (" Zür\ufffd", [], "Zür"),
        ("...", [], "..."),
        ("\ufffd", [], "\ufffd"),
    ],
)
def test_what_is_shown_of_a_continuation(text: str, known: list[str], shown: str) -> None:
    assert _word(text, known) == shown
