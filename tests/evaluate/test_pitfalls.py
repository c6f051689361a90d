"""Mistakes that evaluations of edits have been found to make, and that this one must not."""

from __future__ import annotations

import math

import pytest
import torch

from cases import build_lm
from emendo.evaluate.metrics import (
    answer_rank,
    first_answer,
    full_match,
    mean_nll,
    ngram_entropy,
    repetition,
)
from emendo.models._forward import label_logits, model_inputs
from emendo.models.text import collate
from emendo.models.tokenization import encode


@pytest.mark.parametrize("bos", [False, True])
def test_no_bos_stands_within_a_text_and_none_is_scored(bos: bool) -> None:
    lm = build_lm("llama", bos=bos)
    begin = lm.tokenizer.bos_token_id
    (text,) = encode(lm.tokenizer, [("The capital of Bade is", "Rome")])
    assert begin not in text.labels
    assert (text.ids.count(begin), text.ids[0] == begin) == (int(bos), bos)
    assert lm.tokenizer.decode(text.labels).strip() == "Rome"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_labels_are_predicted_from_the_token_before_whatever_the_padding(kind: str) -> None:
    lm = build_lm(kind)
    texts = encode(lm.tokenizer, [("A", "b"), ("The capital of the long river is", "New Old Town")])
    for side in ("left", "right"):
        batch = collate(texts, side=side)  # type: ignore[arg-type]
        rows = label_logits(lm.model, model_inputs(lm.model, batch, positions=True), batch.positions)
        at = 0
        for text in texts:
            alone = lm.model(torch.tensor([text.ids])).logits[0]
            for place in range(text.start, len(text.ids)):
                torch.testing.assert_close(rows[at], alone[place - 1], rtol=1e-3, atol=1e-3)
                at += 1


def test_ranks_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [0.0, 1.0, 2.0]])
    labels, owner = torch.tensor([2, 1, 0]), torch.tensor([0, 1, 1])
    assert answer_rank(logits, labels, owner, 2).tolist() == [2, 3]  # the worst token; a tie is not before it


def test_an_answer_that_is_no_number_has_the_last_rank() -> None:
    logits = torch.full((1, 7), math.nan)
    assert answer_rank(logits, torch.tensor([3]), torch.tensor([0]), 1).tolist() == [7]


def test_nll_is_per_token_so_that_long_answers_are_not_worse() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])
    found = mean_nll(probabilities.log(), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == pytest.approx([1.5 * math.log(2), math.log(2)])


@pytest.mark.parametrize(
    ("continuation", "target"),
    [
        (" Paris", "Paris"),
        (" paris.", "Paris"),
        (' "Paris".\nThe next', "Paris"),
        (" Paris. It is on the Seine", "Paris"),
        (" NEW  YORK!", "New York"),
        (" Washington, D.C. It", "Washington, D.C."),
        (" 1999. In", "1999"),
        (" Dr. Who", "Dr. Who"),
    ],
)
def test_a_full_answer(continuation: str, target: str) -> None:
    assert full_match(continuation, target)


@pytest.mark.parametrize(
    ("continuation", "target"),
    [
        (" New York City", "New York"),  # the target is the beginning of the answer
        (" Paris, the capital", "Paris"),
        (" the city of Paris", "Paris"),
        (" 5.2 million", "5"),
        (" Parisian", "Paris"),
        ("", "Paris"),
        (" \n", "Paris"),
    ],
)
def test_no_full_answer(continuation: str, target: str) -> None:
    assert not full_match(continuation, target)


def test_an_answer_stops_at_its_sentence_and_not_at_an_initial() -> None:
    assert first_answer(" J. R. Smith. He was") == "J. R. Smith"
    assert first_answer(" 3.5 of them! And") == "3.5 of them"
    assert first_answer(' "No?" she said') == '"No'


def test_entropy_and_repetition_by_hand() -> None:
    assert ngram_entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert ngram_entropy("a a a a a") == 0 == ngram_entropy("")
    assert repetition("a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b c d e") == 0 == repetition("a b")
