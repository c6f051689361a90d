"""Every score worked out by hand on two facts, and every score in the documentation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cases import records
from emendo.evaluate import Evaluation, Outcome, Result
from emendo.evaluate.results import Kind
from emendo.evaluate.scores import ALIASES, GROUPS, SCORES, score_intervals, table, values_of

LN2 = math.log(2)


def outcome(kind: Kind, right: bool, **more: object) -> Outcome:
    fields = {
        "teacher_forced": right,
        "token_level": 0.5,
        "generated": right,
        "known": False,
        "before": 0.125,
    }
    fields |= {"after": 0.5, "kl": 0.25, "exact": False, "share_before": 0.0, "share_after": float(right)}
    fields |= {"rank_before": 9, "rank_after": 1 if right else 4, "nll_before": 3 * LN2, "nll_after": LN2}
    fields |= {"other": "Rome", "other_before": 0.5, "other_after": 0.25, "other_rank_before": 1}
    fields |= {"other_rank_after": 2, "other_nll_before": LN2, "other_nll_after": 2 * LN2}
    return Outcome(kind, "a prompt", "Paris", **{**fields, **more})  # type: ignore[arg-type]


def two_facts() -> list[Result]:
    """The first is right throughout; the second is at its edit alone, and its two neighbours now prefer the target."""
    lost = {"nll_after": 2 * LN2, "other_nll_after": LN2}
    first = (
        outcome("edit", True),
        outcome("paraphrase", True),
        outcome("neighbour", True, known=True, share_after=1.0),
        outcome("told", True, kl=0.5),
        outcome("reversed", True),
    )
    second = (
        outcome("edit", True, rank_after=3),
        outcome("paraphrase", False, **lost),
        outcome("paraphrase", True),
        outcome("neighbour", False, known=True, share_after=0.5, kl=0.75, **lost),
        outcome("neighbour", True, known=True, share_after=1.0, kl=0.25, **lost),
        outcome("told", False, kl=1.5, **lost),
        outcome("one_hop", False),
    )
    return [Result(r, o, 1, 0.1) for r, o in zip(records(2), (first, second), strict=True)]


EXPECTED = {
    "teacher_forced": {
        "edit_success": 1,
        "generalisation": 0.75,
        "locality": 0.75,
        "locality_in_context": 0.5,
    },
    "token_fraction": {"edit_success": 0.5, "generalisation": 0.5, "locality": 0.5},
    "free_generation": {
        "edit_success": 1,
        "generalisation": 0.75,
        "locality": 0.75,
        "edit_success_full": 0,
        "generalisation_full": 0,
    },
    "probability": {
        "target_before": 0.125,
        "target_after": 0.5,
        "target_after_paraphrase": 0.5,
        "old_before": 0.5,
        "old_after": 0.25,
    },
    "rank": {
        "target_before": 9,
        "target_after": 2,
        "target_after_paraphrase": 1.75,
        "old_before": 1,
        "target_reciprocal": (1 + (1 / 4 + 1) / 2) / 2,
        "old_after": 2,
    },
    "kl": {"locality": (0.25 + 0.5) / 2, "locality_in_context": 1.0},
    "counterfact": {
        "efficacy": 1,
        "efficacy_magnitude": 0.25,
        "paraphrase": 0.75,
        "paraphrase_magnitude": 0.125,
        "neighbourhood": 0.5,
        "neighbourhood_magnitude": 0,
        "neighbourhood_in_context": 0.5,
        "score": 3 / (1 + 1 / 0.75 + 1 / 0.5),
    },
    "zsre": {
        "efficacy": 1,
        "paraphrase": 0.75,
        "specificity": 0.875,
        "specificity_clean": 0,
    },
    "mend": {"edit_success": (1 + 2 / 3) / 2, "accuracy_drawdown": (0 + 0.5) / 2},
    "portability": {"reversed": 1, "one_hop": 0, "reversed_generated": 1, "one_hop_generated": 0},
}


def test_every_score_by_hand() -> None:
    found = {
        group: {name: score.mean for name, score in scores.items() if score}
        for group, scores in score_intervals(two_facts()).items()
    }
    assert found == {group: pytest.approx(scores) for group, scores in EXPECTED.items()}


def test_the_old_answer_ties_with_the_target_and_that_is_no_success() -> None:
    tied = [Result(records(1)[0], (outcome("edit", True, other_nll_after=LN2),), 1, 0.1)]
    assert values_of(tied, "counterfact", "efficacy") == [0]


def test_a_broken_edit_is_no_success_by_comparison() -> None:
    broken = outcome("edit", False, nll_after=math.nan, other_nll_after=math.nan)
    assert values_of([Result(records(1)[0], (broken,), 1, 0.1)], "counterfact", "efficacy") == [0]


def test_scores_that_nothing_speaks_to_are_left_out() -> None:
    alone = [Result(records(1)[0], (outcome("edit", True, other=None, other_nll_after=None),), 1, 0.1)]
    found = score_intervals(alone)
    assert "counterfact" not in found and "portability" not in found
    assert set(found["teacher_forced"]) == {"edit_success"}


def test_a_score_of_zero_makes_the_harmonic_mean_zero() -> None:
    lost = {"nll_after": 2 * LN2, "other_nll_after": LN2}
    bad = (outcome("edit", True), outcome("paraphrase", True), outcome("neighbour", True, **lost))
    found = score_intervals([Result(records(1)[0], bad, 1, 0.1)])["counterfact"]["score"]
    assert found is not None and found.mean == 0


def test_the_json_has_every_score_with_its_interval() -> None:
    plain = Evaluation(tuple(two_facts()), {}, 0.1, 0.1).as_dict()["scores"]
    assert plain["counterfact"]["score"].keys() == {"mean", "low", "high"}
    low, high = (
        plain["teacher_forced"]["generalisation"]["low"],
        plain["teacher_forced"]["generalisation"]["high"],
    )
    assert (low, high) == (0.5, 1.0)  # a bootstrap over two facts: either, both or the other


def test_names_are_unlike() -> None:
    assert len({(score.group, score.name) for score in SCORES}) == len(SCORES)
    assert {score.group for score in SCORES} == set(GROUPS)


def test_the_documentation_has_every_score() -> None:
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert table() in page.read_text(encoding="utf-8"), (
        "put what emendo.evaluate.scores.table() gives into it"
    )


def test_deprecated_names_stay_in_the_json() -> None:
    plain = Evaluation(tuple(two_facts()), {}, 0.1, 0.1).as_dict()["scores"]
    for (group, old), name in ALIASES.items():
        assert plain[group][old] == plain[group][name]
        assert values_of(two_facts(), group, old) == values_of(two_facts(), group, name)
