"""Editors of which one knows what they do must land where they must: an oracle, and random changes."""

from __future__ import annotations

import json

import pytest

from cases import build_lm, records
from emendo.data.abilities import Choice
from emendo.evaluate import Evaluation, evaluate
from emendo.evaluate.damage import Damage
from emendo.models.sites import find_sites
from evaluate.known import Oracle, Random


def damage() -> Damage:
    return Damage(
        ("The river is long and old.",), (Choice("grammar", "It", ("is", "are"), 0),), ("The",), 2, 12
    )


def means(found: Evaluation) -> dict[str, dict[str, float]]:
    plain = found.as_dict()["scores"]
    return {group: {name: score["mean"] for name, score in scores.items()} for group, scores in plain.items()}


def test_an_oracle_is_perfect_by_every_protocol() -> None:
    lm, chosen = build_lm("llama"), records(5)
    oracle = Oracle({record.prompt: record.subject or "" for record in chosen})
    found = evaluate(lm, oracle, chosen, damage=damage())
    scores = means(found)
    for group, name in (
        *(
            ("teacher_forced", name)
            for name in ("edit_success", "generalisation", "locality", "locality_told")
        ),
        *(("free_generation", name) for name in ("edit_success", "generalisation", "locality")),
        *(("free_generation", f"{name}_full") for name in ("edit_success", "generalisation")),
        *(("token_fraction", name) for name in ("edit_success", "generalisation", "locality")),
        *(("rank", name) for name in ("target_after", "target_reciprocal")),
        *(("counterfact", name) for name in ("efficacy", "paraphrase")),
        *(("zsre", name) for name in ("efficacy", "paraphrase")),
        ("mend", "edit_success"),
    ):
        assert scores[group][name] == 1, (group, name)
    assert scores["mend"]["accuracy_drawdown"] == 0
    assert scores["kl"]["locality"] == pytest.approx(0, abs=1e-6)
    assert scores["probability"]["target_after"] > 0.99
    assert scores["zsre"]["specificity"] == scores["zsre"]["specificity_clean"]
    for name, seen in found.as_dict()["damage"].items():
        assert seen["mean"] == pytest.approx(seen["clean"], rel=1e-4), name


def test_random_changes_are_bad_by_every_protocol() -> None:
    lm, chosen = build_lm("llama"), records(5)
    found = evaluate(lm, Random(find_sites(lm.model)), chosen, damage=damage())
    scores = means(found)
    for group in ("teacher_forced", "free_generation", "token_fraction"):
        for name in ("edit_success", "generalisation", "locality"):
            assert scores[group][name] <= 0.2, (group, name)
    assert scores["rank"]["target_after"] > 20
    assert scores["kl"]["locality"] > 1
    assert scores["probability"]["target_after"] < 0.05
    seen = found.as_dict()["damage"]["perplexity"]
    assert not 0.7 < seen["mean"] / seen["clean"] < 1.4  # a model that knows nothing may be worse than chance


@pytest.mark.slow
def test_the_same_figures_twice() -> None:
    lm, chosen = build_lm("gpt2"), records(4)
    runs = [evaluate(lm, Random(find_sites(lm.model)), chosen, damage=damage()).as_dict() for _ in range(2)]
    times = ("seconds_per_edit", "seconds_per_edit_in_batch", "cost")
    one, two = ({k: v for k, v in run.items() if k not in times} for run in runs)
    assert json.dumps(one) == json.dumps(two)
