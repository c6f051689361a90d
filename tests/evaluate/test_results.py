"""Scores by hand."""

from __future__ import annotations

import json

import pytest

from emendo.evaluate.intervals import mean_interval
from evaluate.samples import evaluation


def test_scores_by_hand() -> None:
    found = evaluation()
    forced = found.scores()
    means = {name: score.mean for name, score in forced.items() if score}
    assert means == {
        "edit_success": 0.5,
        "generalisation": 0.5,
        "locality": pytest.approx((1 + 1 / 3) / 2),
        "locality_neighbours": 0.75,
        "locality_unrelated": 0.5,
    }
    assert forced["locality_neighbours"] == mean_interval(
        [1.0, 0.5]
    )  # facts are what is counted, not prompts
    assert found.locality_kl() == 0.25
    assert found.results[1].score("locality_neighbours") == 0.5


def test_known_locality_leaves_out_what_the_model_did_not_know() -> None:
    found = evaluation(known=False)
    assert found.locality_known() == (None, 0)
    interval, count = evaluation().locality_known()
    assert count == 6
    assert interval is not None
    assert interval.mean == pytest.approx((1 + 1 / 3) / 2)


def test_without_generation_there_is_no_generated_score() -> None:
    found = evaluation(generated=False)
    assert not found.has_generated
    assert found.as_dict()["generated"] is None
    assert set(found.scores("generated").values()) == {None}


def test_as_dict_by_hand() -> None:
    plain = evaluation().as_dict()
    json.dumps(plain, allow_nan=False)
    assert list(plain)[:6] == [
        "records",
        "protocol",
        "seconds_per_edit",
        "seconds_per_edit_in_batch",
        "teacher_forced",
        "generated",
    ]
    assert plain["records"] == 2
    assert (plain["rank"], plain["relative_norm"]) == (3, 0.01)
    assert plain["prompts"] == {"edit": 2, "paraphrase": 2, "neighbour": 4, "unrelated": 2}
    assert (
        plain["teacher_forced"]["edit_success"]["mean"] == plain["generated"]["edit_success"]["mean"] == 0.5
    )
