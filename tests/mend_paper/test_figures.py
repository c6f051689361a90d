"""Edit success and drawdown worked out by hand."""

from __future__ import annotations

import math

import pytest
from reproduction.mend_paper.figures import figures
from reproduction.mend_paper.measure import Scores, Sums

from emendo.evaluate.intervals import mean_interval


def scores(*facts: Sums, apart: bool = False) -> Scores:
    return Scores(facts, 0.5, (3, 5), (0.01, 0.03), apart)


def fact(prompt: int, paraphrases: int = 0, right: int = 0) -> Sums:
    sums = {"prompt count": 1.0, "prompt hit": float(prompt)}
    return sums | (
        {"paraphrase count": float(paraphrases), "paraphrase hit": float(right)} if paraphrases else {}
    )


def test_edit_success_is_over_the_prompt_and_its_paraphrases_together() -> None:
    found = figures(scores(fact(1, 3, 2), fact(0, 1, 1), fact(1)))
    assert found["edit_success"] == mean_interval([3 / 4, 1 / 2, 1.0])
    assert found["success"] == mean_interval([1.0, 0.0, 1.0])
    assert found["generalisation"] == mean_interval([2 / 3, 1.0])  # the third fact has no paraphrase
    assert found["edit_success"].mean == pytest.approx(0.75)


def test_accuracy_drawdown_is_before_minus_after() -> None:
    near = {"near count": 2.0, "near hit before": 2.0, "near hit": 1.0, "near hit host": 1.0}
    far = {"far count": 2.0, "far hit before": 1.0, "far hit": 2.0, "far hit host": 1.0}
    for kind, sums in (("near", near), ("far", far)):
        names = ("tokens", "kl", "kl host", "same", "same host", "nll before")
        sums |= {f"{kind} {name}": 1.0 for name in names} | {f"{kind} nll host": 1.5}
    found = figures(scores({**fact(1), **near, **far}, {**fact(1), **near}, apart=True))
    assert found["accuracy_before"].mean == pytest.approx(5 / 6)
    assert found["accuracy_after"].mean == pytest.approx(4 / 6)
    assert found["accuracy_drawdown"].mean == pytest.approx(1 / 6)
    assert found["accuracy_drawdown_near"].mean == pytest.approx(1 / 2)
    assert found["accuracy_drawdown_far"].mean == pytest.approx(-1 / 2)  # an edit may also do good
    assert found["accuracy_drift"].mean == pytest.approx(2 / 6)
    assert found["accuracy_drawdown_of_host"].mean == pytest.approx(-1 / 6)
    assert found["unchanged"].mean == pytest.approx(3 / 6)
    assert found["drift_unchanged"].mean == pytest.approx(3 / 6)
    assert found["drift_task_loss"].mean == pytest.approx(1.5 / 6)


def test_perplexity_drawdown_is_after_minus_before_and_weighted_by_tokens() -> None:
    def passage(tokens: int, before: float, after: float) -> Sums:
        nll = {"passage nll before": tokens * math.log(before), "passage nll": tokens * math.log(after)}
        return {**fact(1), "passage count": 1.0, "passage tokens": float(tokens), **nll, **_CHANGES}

    found = figures(scores(passage(1, 4.0, 4.0), passage(3, 4.0, 8.0)))
    assert found["perplexity_before"].mean == pytest.approx(4.0)
    assert found["perplexity_after"].mean == pytest.approx(4.0 ** (1 / 4) * 8.0 ** (3 / 4))
    assert found["perplexity_drawdown"].mean == pytest.approx(4.0 * (2**0.75 - 1))
    assert found["locality_kl"].mean == pytest.approx(2 / 4)
    assert found["unchanged"].mean == pytest.approx(2 / 4)


_CHANGES = {"passage kl": 1.0, "passage same tokens": 1.0}


def test_rank_size_and_time_are_means_without_an_interval() -> None:
    found = figures(scores(fact(1)))
    assert {name: found[name].mean for name in ("rank", "relative_norm", "seconds_per_edit")} == {
        "rank": 4.0,
        "relative_norm": 0.02,
        "seconds_per_edit": 0.5,
    }
    assert all(found[name].low == found[name].high for name in ("rank", "relative_norm", "seconds_per_edit"))
    assert "accuracy_drawdown" not in found
    assert "perplexity_drawdown" not in found
    assert "locality_kl" not in found
