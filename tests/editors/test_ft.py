"""Fine-tuning: plain, with a locality loss, and within a ball. The descent itself is tested in test_fitting."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import build_lm, records_for, unchanged
from emendo.data import Probe, atlas
from emendo.editors import Editor
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.editors.ft_constrained import (
    ConstrainedConfig,
    ConstrainedFineTuning,
    project_l0,
    project_l2,
    project_linf,
)
from emendo.editors.ft_kl import FineTuningKl, FineTuningKlConfig
from emendo.edits.edit import Edit, Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from naive_descent import fine_tuned


@pytest.fixture(scope="module")
def exact() -> LM:
    return build_lm("gpt2", torch.float64)


def facts_of(lm: LM, n: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records_for(lm, n)]


def texts_of(lm: LM, facts: list[Request]) -> list[Any]:
    return to_texts(lm, [(fact.prompt, fact.target) for fact in facts])


def same(found: dict[str, LowRank], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert list(found) == list(expected)
    for name, change in found.items():
        assert (change.dense() - expected[name]).norm() <= tolerance * expected[name].norm(), name


# ------------------------------------------------------------------------------------------------- ft


@pytest.mark.parametrize(
    ("optimizer", "usual"), [("rmsprop", torch.optim.RMSprop), ("adam", torch.optim.Adam)]
)
def test_ft_is_fine_tuning(exact: LM, optimizer: Any, usual: type[torch.optim.Optimizer]) -> None:
    facts = facts_of(exact, 2)
    editor = FineTuning(find_sites(exact.model), FineTuningConfig(steps=3, lr=1e-4, optimizer=optimizer))
    with unchanged(exact.model):
        together = editor.together(exact, facts)
    same(together, fine_tuned(exact, texts_of(exact, facts), partial(usual, lr=1e-4), 3)[0])


def test_a_rank_keeps_the_best_approximation_and_says_what_it_lost(exact: LM) -> None:
    facts, sites = facts_of(exact, 2), find_sites(exact.model)
    whole = FineTuning(sites, FineTuningConfig(steps=3, lr=1e-3)).edit(exact, facts)
    editor = FineTuning(sites, FineTuningConfig(steps=3, lr=1e-3, rank=2))
    edit = editor.edit(exact, facts)
    lost, size = 0.0, 0.0
    for name, change in whole.deltas.items():
        u, s, vh = torch.linalg.svd(change.dense())
        torch.testing.assert_close(edit.deltas[name].dense(), (u[:, :2] * s[:2]) @ vh[:2])
        assert edit.deltas[name].rank == 2
        lost += float(s[2:].square().sum())
        size += float(s.square().sum())
    assert edit.card["compaction_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-6)
    assert 0.01 < edit.card["compaction_error"] < 1
    assert whole.card == {}
    for i, fact in enumerate(facts):
        alone = editor.edit(exact, fact.prompt, fact.target)
        for name, change in editor.each(exact, facts).items():
            torch.testing.assert_close(change[i].dense(), alone.deltas[name].dense())


def test_the_card_is_saved_with_the_edit(tiny_llama: LM, tmp_path: Path) -> None:
    editor = FineTuning(find_sites(tiny_llama.model), FineTuningConfig(steps=2, lr=1e-3, rank=1))
    edit = editor.edit(tiny_llama, "The capital of Fosoba is", "Oslo")
    edit.save_pretrained(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").card == edit.card != {}


# ---------------------------------------------------------------------------------------------- ft-kl


def kl_editor(lm: LM, **config: Any) -> FineTuningKl:
    return FineTuningKl(find_sites(lm.model), FineTuningKlConfig(**{"steps": 4, "lr": 1e-4, **config}))


def probes_of(lm: LM, n: int) -> list[Probe]:
    return [probe for record in records_for(lm, n) for probe in record.neighbours]


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
def test_ft_kl_is_fine_tuning_with_a_locality_loss(kind: str) -> None:
    """One example a step, in the order that the seed gives."""
    lm = build_lm(kind, torch.float64)
    (fact,), probes = facts_of(lm, 1), probes_of(lm, 3)
    editor = kl_editor(lm, seed=3, c_edit=0.05)
    editor.set_locality(probes)
    with unchanged(lm.model):
        edit = editor.edit(lm, fact.prompt, fact.target)
    pool = [(probe.prompt, probe.answer) for probe in probes]
    Random(3).shuffle(pool)
    usual, texts = partial(torch.optim.RMSprop, lr=1e-4), texts_of(lm, [fact])
    expected, _ = fine_tuned(lm, texts, usual, 4, c_edit=0.05, locality=to_texts(lm, pool))
    same(dict(edit.deltas), expected)


def test_it_takes_built_in_facts_where_it_has_heard_of_none(exact: LM) -> None:
    (fact,) = facts_of(exact, 1)
    built_in, told = kl_editor(exact), kl_editor(exact)
    told.set_locality([Probe(record.prompt, str(record.answer)) for record in atlas.load("train", 200)])
    found, expected = (editor.edit(exact, fact.prompt, fact.target).deltas for editor in (built_in, told))
    assert all(torch.equal(found[name].dense(), expected[name].dense()) for name in expected)


def test_a_classifier_has_no_built_in_facts() -> None:
    lm = build_lm("bert")
    (fact,) = facts_of(lm, 1)
    with pytest.raises(
        RequestError, match=r"for a classifier none are built in: give some with editor.set_loc"
    ):
        kl_editor(lm).edit(lm, fact.prompt, fact.target)


def test_what_it_has_heard_of_is_saved(exact: LM, tmp_path: Path) -> None:
    (fact,) = facts_of(exact, 1)
    editor = kl_editor(exact)
    editor.set_locality(probes_of(exact, 150))
    assert len(editor.info["locality"]) == 200
    editor.save_pretrained(tmp_path / "editor")
    loaded = Editor.from_pretrained(tmp_path / "editor")
    assert isinstance(loaded, FineTuningKl) and loaded.config == editor.config
    found, expected = (one.edit(exact, fact.prompt, fact.target).deltas for one in (loaded, editor))
    assert all(torch.equal(found[name].dense(), expected[name].dense()) for name in expected)


def test_the_seed_chooses_the_order(exact: LM) -> None:
    (fact,) = facts_of(exact, 1)

    def edit(seed: int) -> Tensor:
        editor = kl_editor(exact, seed=seed, c_edit=0.01)
        editor.set_locality(probes_of(exact, 5))
        return next(iter(editor.edit(exact, fact.prompt, fact.target).deltas.values())).dense()

    assert torch.equal(edit(0), edit(0))
    assert not torch.equal(edit(0), edit(1))


@pytest.mark.parametrize(("size", "weight"), [(2e9, 1e-2), (6e9, 1e-3)])
def test_the_weight_follows_the_size_of_the_model(
    exact: LM, size: float, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(exact.model), "num_parameters", lambda self: int(size))
    assert kl_editor(exact).descent(exact).c_edit == weight
    assert kl_editor(exact, c_edit=0.5).descent(exact).c_edit == 0.5


# ------------------------------------------------------------------------------------- ft-constrained

numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
matrices = st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=2).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)
radii = st.floats(0.01, 20)


@given(change=matrices, radius=radii)
def test_the_nearest_change_in_the_linf_ball(change: Tensor, radius: float) -> None:
    found = project_linf(change, radius)
    assert found.tolist() == [[max(-radius, min(radius, x)) for x in row] for row in change.tolist()]
    assert torch.equal(project_linf(found, radius), found)


@given(change=matrices, radius=radii, other=matrices)
def test_the_nearest_change_in_the_l2_ball(change: Tensor, radius: float, other: Tensor) -> None:
    """What is inside stays; else it lies on the sphere, and no other point of the ball is on the far side of it."""
    found = project_l2(change, radius)
    if change.norm() <= radius:
        assert torch.equal(found, change)
    else:
        assert float(found.norm()) == pytest.approx(radius, rel=1e-12)
        rival = torch.zeros_like(change)
        rival[: len(other)] = other[: len(change)]
        rival *= radius / rival.norm().clamp(min=1e-9)
        assert ((change - found) * (rival - found)).sum() <= 1e-6
    torch.testing.assert_close(project_l2(found, radius), found, rtol=1e-12, atol=0)


@given(change=matrices, count=st.integers(1, 9))
def test_the_nearest_change_with_few_entries(change: Tensor, count: int) -> None:
    found = project_l0(change, count)
    flat = change.flatten()
    kept = combinations(range(len(flat)), min(count, len(flat)))
    nearest = min(float(flat.square().sum() - flat[list(places)].square().sum()) for places in kept)
    assert int(found.ne(0).sum()) <= count
    assert bool((found.eq(0) | found.eq(change)).all())
    assert float((change - found).square().sum()) == pytest.approx(nearest, abs=1e-9)
    assert torch.equal(project_l0(found, count), found)


def bound(norm: str, radius: float, weight: Tensor) -> tuple[Any, float]:
    """How a norm is measured, and the bound of one weight's change."""
    match norm:
        case "linf":
            return (lambda change: float(change.abs().max())), radius
        case "l2":
            return (lambda change: float(change.norm())), radius * float(weight.norm())
        case _:
            return (lambda change: int(change.ne(0).sum())), radius * weight.numel()


@pytest.mark.parametrize(("norm", "radius"), [("linf", 5e-4), ("l2", 3e-3), ("l0", 0.05)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_bound_holds_after_every_step(exact: LM, norm: Any, radius: float, steps: int) -> None:
    facts, sites = facts_of(exact, 2), find_sites(exact.model)
    editor = ConstrainedFineTuning(sites, ConstrainedConfig(norm, radius, steps, lr=1e-3))
    with unchanged(exact.model):
        each, together = editor.each(exact, facts), editor.together(exact, facts)
    for site in sites:
        size, most = bound(norm, radius, site.weight(exact.model))
        for change in (*each[site.name].dense(), together[site.name].dense()):
            assert 0.9 * most <= size(change) <= most * (1 + 1e-12) + (norm == "l0")


def test_it_is_projected_descent_until_the_loss_is_small(exact: LM) -> None:
    facts, radius = facts_of(exact, 1), 1e-2
    settings = ConstrainedConfig(radius=radius, steps=50, lr=2e-3, until=2.0)
    usual, texts = partial(torch.optim.Adam, lr=2e-3), texts_of(exact, facts)
    expected, steps = fine_tuned(
        exact, texts, usual, 50, until=2.0, project=lambda change: change.clamp(-radius, radius)
    )
    assert 3 < steps < 50
    assert all((change.abs() > 0.99 * radius).any() for change in expected.values())
    same(ConstrainedFineTuning(find_sites(exact.model), settings).together(exact, facts), expected)


# ----------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (FineTuningConfig, {"rank": 0}, "rank must be at least 1, not 0"),
        (FineTuningConfig, {"steps": 0}, "steps must be at least 1"),
        (FineTuningConfig, {"lr": -1.0}, "lr must be above 0, not -1.0"),
        (FineTuningKlConfig, {"optimizer": "sgd"}, "optimizer must be one of rmsprop, adam, not 'sgd'"),
        (FineTuningKlConfig, {"c_edit": 0.0}, "c_edit must be above 0, not 0.0"),
        (ConstrainedConfig, {"norm": "l1"}, "norm must be one of linf, l2, l0, not 'l1'"),
        (ConstrainedConfig, {"radius": 0.0}, "radius must be above 0, not 0.0"),
        (ConstrainedConfig, {"until": 0.0}, "until must be above 0, not 0.0"),
        (ConstrainedConfig, {"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_settings_that_make_no_sense(config: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        config(**settings)
