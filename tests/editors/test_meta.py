"""The learned gradient transforms: meta-curvature and Meta-SGD by their equations, and, KE too, how they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import build_lm, records, records_for, unchanged
from emendo.editors import GradientEditor, editor_class
from emendo.editors._nets import RunningStats
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.meta_curvature import MetaCurvature, MetaCurvatureConfig
from emendo.editors.meta_sgd import MetaSgd, MetaSgdConfig
from emendo.editors.objective import Episode, Weights
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig, train
from emendo.train.episodes import Episodes
from emendo.train.step import training_step, validation_step

FACTS = [Request(record.prompt, record.target) for record in records(3)]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ke": [{"lstm_hidden": 8, "condition": 8, "hidden": 8}],
    "meta-curvature": [{}, {"norm": False}, {"shared": False}],
    "meta-sgd": [{}, {"norm": False}],
}
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]
DEFAULTS = [(name, several[0]) for name, several in SETTINGS.items()]


def make(name: str, settings: dict[str, Any], sites: tuple[Site, ...], **more: Any) -> GradientEditor:
    kind: Any = editor_class(name)
    return kind(sites, kind.Config(**settings, **more))  # type: ignore[no-any-return]


def moved(editor: GradientEditor, std: float) -> GradientEditor:
    """No longer at its start."""
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter += std * torch.randn_like(parameter)
    return editor


def captured(lm: LM, sites: tuple[Site, ...], facts: int = 3) -> dict[str, Factors]:
    texts = to_texts(lm, [(r.prompt, r.target) for r in records_for(lm, facts)])
    return edit_factors(Trunk(lm.model, sites), sites, texts)


def gradient(rows: Factors) -> Tensor:
    """Every example's dense gradient, one outer product at a time."""
    dense = rows.u.new_zeros(rows.examples, rows.delta.shape[1], rows.u.shape[1])
    for u, delta, owner in zip(rows.u, rows.delta, rows.owner.tolist(), strict=True):
        dense[owner] += torch.outer(delta, u)
    return dense


def normalised(rows: Factors, part: Any) -> Factors:
    """The factors by the statistics that a part of an editor has."""

    def scaled(x: Tensor, stats: RunningStats) -> Tensor:
        return ((x - stats.mean) / (stats.std() + 1e-7)).to(x)

    return Factors(
        scaled(rows.u, part.u_stats), scaled(rows.delta, part.delta_stats), rows.owner, rows.examples
    )


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# ----------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_meta_curvature_multiplies_the_gradient_from_both_sides(
    tiny_llama: LM, norm: bool, shared: bool
) -> None:
    sites = find_sites(tiny_llama.model, last=2)
    editor, factors = (
        MetaCurvature(sites, MetaCurvatureConfig(norm=norm, shared=shared)),
        captured(tiny_llama, sites),
    )
    editor.train()(factors)  # takes statistics
    moved(editor, 0.3)
    keys = {s.name: f"{s.d_in}x{s.d_out}" if shared else str(i) for i, s in enumerate(sites)}
    assert editor.curvature.keys() == set(keys.values())
    for alpha, (name, change) in zip(editor.alpha, editor.eval()(factors).items(), strict=True):
        part: Any = editor.curvature[keys[name]]
        rows = normalised(factors[name], part) if norm else factors[name]
        close(change.dense(), -alpha * part.m_out @ gradient(rows) @ part.m_in.T)
        assert change.rank == int(torch.bincount(rows.owner).max())


@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_meta_sgd_has_a_step_size_for_every_weight(tiny_llama: LM, norm: bool) -> None:
    sites = find_sites(tiny_llama.model, last=2)
    editor, factors = MetaSgd(sites, MetaSgdConfig(norm=norm)), captured(tiny_llama, sites)
    editor.train()(factors)
    moved(editor, 0.3)
    found = editor.eval()(factors)
    for s, part in zip(sites, editor.steps, strict=True):
        rows: Any = normalised(factors[s.name], part) if norm else factors[s.name]
        close(found[s.name].dense(), -part.alpha * gradient(rows))  # type: ignore[operator]
        assert found[s.name].rank == min(s.shape)


@pytest.mark.parametrize("name", ["meta-curvature", "meta-sgd"])
@torch.no_grad()
def test_both_start_as_the_plain_step(tiny_gpt2: LM, name: str) -> None:
    """Without normalisation as gradient descent, with it as MEND starts."""
    sites = find_sites(tiny_gpt2.model)
    factors = captured(tiny_gpt2, sites)
    for site, change in make(name, {}, sites, alpha=0.03, norm=False)(factors).items():
        close(change.dense(), -0.03 * gradient(factors[site]))
    one = sites[:1] if name == "meta-sgd" else sites  # its statistics are not shared
    expected = Mend(one, MendConfig(alpha=0.03))(factors)
    for site, change in make(name, {}, one, alpha=0.03)(factors).items():
        close(change.dense(), expected[site].dense())


def test_statistics_are_taken_in_training_mode_alone(tiny_llama: LM) -> None:
    sites = find_sites(tiny_llama.model, last=1)
    factors = captured(tiny_llama, sites)
    rows = {
        shape: torch.cat([factors[s.name].u for s in sites if s.shape == shape])
        for shape in {s.shape for s in sites}
    }
    for name in ("meta-curvature", "meta-sgd"):
        editor = make(name, {}, sites)
        editor.eval()(factors)
        stats = [m for m in editor.modules() if isinstance(m, RunningStats)]
        assert all(s.count == 0 for s in stats)
        editor.train()(factors)
        assert all(s.count > 0 for s in stats)
    part: Any = make("meta-curvature", {}, sites)
    part(factors)
    for (d_in, d_out), u in rows.items():
        assert part.curvature[f"{d_in}x{d_out}"].u_stats.count == len(u)  # of all matrices of the shape


def test_the_edit_of_several_facts_is_one_dense_change(tiny_llama: LM) -> None:
    editor = MetaSgd(find_sites(tiny_llama.model, last=1), MetaSgdConfig(alpha=0.01, norm=False))
    edit = editor.edit(tiny_llama, FACTS)
    each = editor.each(tiny_llama, FACTS)
    for site in editor.sites:
        assert edit.deltas[site.name].rank == min(site.shape)
        close(edit.deltas[site.name].dense(), each[site.name].dense().sum(0))


def test_learning_rates_of_their_own() -> None:
    sites = (Site("w", 3, 2, "blocks", 0, attention=False, transposed=False),)
    curvature = MetaCurvature(sites, MetaCurvatureConfig(alpha=0.5, alpha_lr=0.25))
    matrices, alpha = curvature.parameter_groups(0.1)
    assert [matrices["lr"], alpha["lr"]] == pytest.approx([0.1, 0.025])
    assert alpha["params"] == [curvature.alpha]
    assert sorted(p.shape for p in matrices["params"]) == [(2, 2), (3, 3)]
    (steps,) = MetaSgd(sites, MetaSgdConfig(alpha_lr=0.25)).parameter_groups(0.1)
    assert steps["lr"] == pytest.approx(0.025)
    assert [p.shape for p in steps["params"]] == [(2, 3)]


def test_settings_that_make_no_sense() -> None:
    for kind, settings in (
        (MetaCurvatureConfig, {"alpha_lr": -1.0}),
        (MetaSgdConfig, {"alpha_lr": 0.0}),
    ):
        with pytest.raises(RequestError, match=next(iter(settings))):
            kind(**settings)


# ------------------------------------------------------------------------------------------ training


def episodes_of(
    lm: LM, sites: tuple[Site, ...], dtype: torch.dtype = torch.float32, steps: int = 1
) -> tuple[TrunkCache, list[list[Episode]]]:
    episodes = Episodes(lm, records_for(lm, 12), TrainConfig(batch=3, near=1, sibling=1))
    batches = [episodes.batch(step) for step in range(steps)]
    store = TrunkCache(Trunk(lm.model, sites), dtype=dtype)
    store.ensure(text for batch in batches for episode in batch for text in episode.texts())
    return store, batches


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_the_gradient_of_a_step_equals_finite_differences(name: str, settings: dict[str, Any]) -> None:
    lm = build_lm("gpt2", torch.float64)
    sites = find_sites(lm.model, last=2)
    store, (batch,) = episodes_of(lm, sites, torch.float64)
    editor = moved(make(name, settings, sites).double(), 0.003)
    editor.train()(editor.factors(store.trunk, [episode.edit for episode in batch]))
    editor.eval()
    with unchanged(lm.model):
        assert training_step(editor, store, batch, Weights(0.3)) is not None
    steps = []
    for parameter in editor.parameters():
        assert parameter.grad is not None
        noise = torch.randn_like(parameter)
        steps.append(1e-6 * (noise / noise.norm() + parameter.grad / (parameter.grad.norm() + 1e-30)))
    losses = []
    for factor in (1, -2):
        with torch.no_grad():
            for parameter, step in zip(editor.parameters(), steps, strict=True):
                parameter += factor * step
        outcome = validation_step(editor, store, batch, Weights(0.3))
        assert outcome is not None
        losses.append(outcome.loss)
    expected = sum(float((p.grad * step).sum()) for p, step in zip(editor.parameters(), steps, strict=True))  # type: ignore[operator]
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-8


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_a_step_is_the_same_with_and_without_looking_ahead(
    name: str, settings: dict[str, Any], tiny_llama: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "emendo.editors.gradient.BUCKET_TOKENS", 40
    )  # several buckets, so that rows must be reordered
    sites = find_sites(tiny_llama.model, last=2)
    store, batches = episodes_of(tiny_llama, sites, steps=4)
    gradients = []
    for found in (None, make(name, settings, sites).look_ahead(store, batches)[2]):
        torch.manual_seed(0)
        editor = moved(make(name, settings, sites), 1e-3)
        assert training_step(editor, store, batches[2], Weights(0.2), found) is not None
        gradients.append([parameter.grad for parameter in editor.parameters()])
    for one, other in zip(*gradients, strict=True):
        close(one, other)  # type: ignore[arg-type]


LEARNING: dict[str, dict[str, Any]] = {
    "ke": {"step": 0.5},
    "meta-curvature": {"alpha": 3e-3},
    "meta-sgd": {"alpha": 5e-3, "alpha_lr": 0.05},
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [DEFAULTS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in DEFAULTS[1:])],
    ids=str,
)
def test_it_learns_to_edit(name: str, settings: dict[str, Any], tiny_llama: LM) -> None:
    """A short run on a few facts leaves the outer loss well below that of the step it starts from."""
    sites = find_sites(tiny_llama.model, last=2)
    store, (batch,) = episodes_of(tiny_llama, sites)
    editor = make(name, settings, sites, **LEARNING[name])
    editor.train()(editor.factors(store.trunk, [episode.edit for episode in batch]))
    before = validation_step(editor, store, batch, Weights(0.3))
    config = TrainConfig(steps=24, batch=3, lr=4e-2, warmup=0, near=1, sibling=0)
    train(tiny_llama, editor, records_for(tiny_llama, 12), [], config)
    after = validation_step(editor, store, batch, Weights(0.3))
    assert before is not None
    assert after is not None
    assert after.loss < 0.8 * before.loss


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
@torch.no_grad()
def test_edits_of_a_batch_are_those_made_alone(kind: str, name: str, settings: dict[str, Any]) -> None:
    lm = build_lm(kind)
    editor = moved(make(name, settings, find_sites(lm.model, last=1)), 0.05).eval()
    requests = [Request(r.prompt, r.target) for r in records_for(lm, 3)]
    together = editor.each(lm, requests)
    for i, request in enumerate(requests):
        alone = editor.edit(lm, request.prompt, request.target)
        for site, change in alone.deltas.items():  # type: ignore[attr-defined]
            close(together[site].dense()[i], change.dense())
