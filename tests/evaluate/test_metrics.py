"""Scores against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emendo.evaluate.metrics import (
    all_match,
    answer_match,
    answer_probability,
    first_line,
    normalise,
    perplexity,
    same_answer,
    token_match,
    unchanged,
)

LABELS = torch.tensor([5, 6, 7, 8, 9, 9])
OWNER = torch.tensor([0, 0, 1, 3, 3, 3])  # example 2 has no label


def test_token_match_is_the_share_of_each_examples_tokens() -> None:
    predicted = torch.tensor([5, 0, 7, 8, 0, 0])
    assert token_match(predicted, LABELS, OWNER, 4).tolist() == pytest.approx([0.5, 1.0, 0.0, 1 / 3])


def test_all_match_wants_every_token() -> None:
    predicted = torch.tensor([5, 6, 0, 8, 9, 0])
    assert all_match(predicted, LABELS, OWNER, 4).tolist() == [True, False, True, False]


def test_answer_probability_is_the_product_over_the_tokens() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    found = answer_probability(probabilities.log(), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == pytest.approx([0.5 * 0.8, 0.2])


@pytest.mark.parametrize(
    ("continuation", "target"),
    [
        (" Paris, the", "Paris"),
        (" Paris", "Paris"),
        ("Paris.", " Paris "),
        (" paris is", "Paris"),
        (" PARIS!", "Paris"),
        (" Paris's river", "Paris"),
        ('\n\n"Paris" is', "Paris"),
        (" **Paris** is", "Paris"),
        (" “Paris”", "Paris"),
        (" New  York\nCity", "New York"),
        (" Washington, D.C., where", "Washington, D.C."),
        (" Côte d’Ivoire and", "Côte d'Ivoire"),
        (" Co\u0302te d'Ivoire", "Côte d'Ivoire"),
        (" STRASSE 5", "Straße"),
        (" 1999. In", "1999"),
        (" 5, then 6", "5"),
        (" +49 is", "+49"),
        (" C++ is", "C++"),
    ],
)
def test_answer_match(continuation: str, target: str) -> None:
    assert answer_match(continuation, target)


@pytest.mark.parametrize(
    ("continuation", "target"),
    [
        (" Parisian cafés", "Paris"),  # the target is the start of a longer word
        (" Par", "Paris"),  # the answer breaks off
        (" the city of Paris", "Paris"),
        (" New Yorkers", "New York"),
        (" Newer York", "New York"),
        (" 5.2 million", "5"),
        (" 1,000", "1"),
        (" 19995", "1999"),
        (" 49", "+49"),
        (" Sao Paulo", "São Paulo"),
        ("", "Paris"),
        (" ", "Paris"),
        (" London", "Paris"),
    ],
)
def test_no_answer_match(continuation: str, target: str) -> None:
    assert not answer_match(continuation, target)


@given(st.text(), st.text(max_size=5))
def test_answer_match_is_blind_to_case_and_blanks(text: str, around: str) -> None:
    wanted = normalise(text)
    blanks = " " * len(around)
    assert answer_match(text, wanted) == answer_match(blanks + text + blanks, wanted)


def test_a_target_of_punctuation_alone_is_still_a_target() -> None:
    assert answer_match(" ...", "...")
    assert not answer_match(" no", "...")


def test_the_same_answer_is_the_same_words_at_its_place() -> None:
    assert same_answer(" Paris, the capital", " Paris. It is", "Paris")
    assert same_answer(" the City of Light", " The city of\nnothing", "a b c")
    assert not same_answer(" Paris", " Parisian", "Paris")
    assert not same_answer(" Rome", " Paris", "Paris")
    assert not same_answer(" New York", " New Delhi", "New Delhi")
    assert same_answer(" New York", " New Delhi", "Oslo")  # one word is looked at, for the answer has one
    assert same_answer("", "\n", "Oslo")
    assert not same_answer("", " Oslo", "Oslo")


def test_continuations_are_compared_up_to_their_first_line_break() -> None:
    assert first_line("\n\n French, he said. \nThe next") == "French, he said."
    assert first_line(" \n ") == ""
    assert unchanged(" French.\nOne", "\n French.\nTwo")
    assert not unchanged(" French.", " french.")
    assert not unchanged(" French", " French, of course")
    assert unchanged("", "")


# ----------------------------------------------------------------------------- sums over facts


def test_perplexity_is_weighted_by_tokens() -> None:
    nll, tokens = torch.tensor([math.log(2) * 3 + math.log(8), 0.0]), torch.tensor([4.0, 7.0])
    assert perplexity(nll, tokens).tolist() == pytest.approx([2**1.5, 1.0])
