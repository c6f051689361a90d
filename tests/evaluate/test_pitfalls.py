"""Mistakes that evaluations of edits have been found to make, and that this one must not."""

from __future__ import annotations

import math

import pytest
import torch

from cases import build_lm
from emendo.evaluate.intervals import harmonic, paired, score_interval
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


def test_the_interval_of_a_share_is_a_bootstrap_or_else_wilsons() -> None:
    some = score_interval([1.0] * 8 + [0.0] * 2)
    assert some is not None and (some.low, some.high) == (0.5, 1.0)
    assert score_interval([1.0] * 20).low == pytest.approx(0.838875, abs=1e-6)  # type: ignore[union-attr]
    same = score_interval([2.0, 2.0], share=False)
    assert same is not None and (same.low, same.high) == (2, 2)
    assert score_interval([]) is None


def test_harmonic_by_hand() -> None:
    assert float(harmonic(torch.tensor([1.0, 0.5]))) == pytest.approx(2 / 3)


def test_a_paired_difference() -> None:
    first, second = [0.0] * 10, [1.0] * 9 + [0.0]
    found = paired(first, second)
    assert found is not None
    assert (found.first, found.second, found.facts) == (0, pytest.approx(0.9), 10)
    assert found.difference.mean == pytest.approx(0.9)
    assert found.p == pytest.approx(2 / 2**9, abs=0.002)  # all nine that differ must have one sign
    same = paired(first, first)
    assert same is not None and same.p == 1
    assert paired([], []) is None


def test_pairing_sees_what_two_intervals_would_hide() -> None:
    first = [float(i % 2) for i in range(40)]
    second = [max(value, float(i < 12)) for i, value in enumerate(first)]
    found = paired(first, second)
    assert found is not None and found.p < 0.05
    one, two = score_interval(first), score_interval(second)
    assert one is not None and two is not None and one.high > two.low
