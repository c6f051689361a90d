"""Scores against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emendo.evaluate.metrics import (
    Interval,
    all_match,
    answer_match,
    answer_probability,
    bootstrap_interval,
    first_line,
    mean_interval,
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
    ("values", "expected"),
    [
        # Wilson: centre (p + z^2/2n) / (1 + z^2/n), half width z/(1 + z^2/n) sqrt(p(1-p)/n + z^2/4n^2)
        ([1.0] * 8 + [0.0] * 2, (0.8, 0.490162, 0.943318)),
        ([1.0] * 5 + [0.0] * 5, (0.5, 0.236593, 0.763407)),
        ([1.0] * 20, (1.0, 0.838875, 1.0)),
        ([0.0] * 20, (0.0, 0.0, 0.161125)),
        ([0.5], (0.5, 0.054621, 0.945379)),
    ],
)
def test_mean_interval(values: list[float], expected: tuple[float, float, float]) -> None:
    interval = mean_interval(values)
    assert interval is not None
    assert (interval.mean, interval.low, interval.high) == pytest.approx(expected, abs=1e-6)
    assert interval.as_dict() == {"mean": interval.mean, "low": interval.low, "high": interval.high}


def test_mean_interval_of_nothing_is_none() -> None:
    assert mean_interval([]) is None


@pytest.mark.parametrize("bad", [[1.5], [0.2, -0.1], [float("nan")]])
def test_mean_interval_refuses_what_is_no_share(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval(bad)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_mean_interval_holds_the_mean(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval is not None
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.high - interval.low > 0


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


def ratio(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]


def test_bootstrap_interval_is_that_of_a_plain_loop() -> None:
    rows = [(1.0, 2.0), (0.0, 4.0), (3.0, 3.0), (2.0, 9.0), (5.0, 6.0)]
    found = bootstrap_interval(rows, ratio, draws=500, seed=3)
    drawn = torch.randint(5, (500, 5), generator=torch.Generator().manual_seed(3)).tolist()
    values = sorted(sum(rows[i][0] for i in row) / sum(rows[i][1] for i in row) for row in drawn)
    assert found is not None
    assert found.mean == pytest.approx(11 / 24)
    assert values[12] <= found.low <= values[13]  # the 2.5% point lies between them
    assert values[486] <= found.high <= values[487]
    assert bootstrap_interval(rows, ratio, draws=500, seed=3) == found
    assert bootstrap_interval(rows, ratio, draws=500, seed=4) != found


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_bootstrap_interval_of_a_proportion_has_its_usual_width(share: float) -> None:
    count = 400
    found = bootstrap_interval([(float(i < share * count), 1.0) for i in range(count)], ratio)
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / count), rel=0.1)


def test_bootstrap_interval_encloses_the_statistic() -> None:
    assert bootstrap_interval([(0.25, 1.0)], ratio) == Interval(0.25, 0.25, 0.25)
    largest = bootstrap_interval([(float(i), 1.0) for i in range(9)], lambda sums: sums[..., 0].clamp(min=36))
    assert largest is not None
    assert largest.low == largest.mean == 36


def test_bootstrap_interval_of_nothing_and_of_no_number() -> None:
    assert bootstrap_interval([], ratio) is None
    for bad in (math.nan, math.inf):
        found = bootstrap_interval([(1.0, 1.0), (bad, 1.0)], ratio)
        assert found is not None
        assert not math.isfinite(found.mean) and not math.isfinite(found.low)
