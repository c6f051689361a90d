"""The search for a change by descent, against a copy of the model that is fine-tuned in the usual way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from cases import build_lm, in_slow_suite, plain_logits, random_texts, records_for, unchanged
from emendo.editors import descent as fitting
from emendo.editors.descent import Adam, Descent, RmsProp
from emendo.errors import TrainingError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from naive_descent import fine_tuned


def texts_of(lm: LM, n: int) -> list[Text]:
    """Made-up facts that the model does not say yet."""
    texts = to_texts(lm, [(record.prompt, record.target) for record in records_for(lm, 3 * n)])
    return [text for text in texts if not said(lm, text)][:n]


def said(lm: LM, text: Text) -> bool:
    return plain_logits(lm.model, collate([text])).argmax(-1).tolist() == list(text.labels)


def same(found: dict[str, LowRank], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal but for the few entries whose gradient is so small that its sign is chance."""
    assert list(found) == list(expected)
    for name, change in found.items():
        assert (change.dense() - expected[name]).norm() <= tolerance * expected[name].norm(), name


# ------------------------------------------------------------------------------ against the slow reference


RMSPROP = Descent(optimizer=RmsProp(1e-4), steps=4)
ADAM = Descent(optimizer=Adam(1e-3), steps=4)
USUAL = {RMSPROP: partial(torch.optim.RMSprop, lr=1e-4), ADAM: partial(torch.optim.Adam, lr=1e-3)}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, RMSPROP) for kind in ("llama", "bart", "bert")),
        ("gpt2", ADAM),
        *(pytest.param(kind, RMSPROP, marks=pytest.mark.slow) for kind in ("gpt2", "opt", "t5-gated")),
        pytest.param("bart", ADAM, marks=pytest.mark.slow),
    ],
)
def test_it_is_fine_tuning(kind: str, how: Descent) -> None:
    """Several in one batch, each by itself; several as one edit, with a locality loss that begins again."""
    lm = build_lm(kind, torch.float64)
    texts, sites = texts_of(lm, 2), find_sites(lm.model)
    more = {"c_edit": 0.05, "locality": random_texts(kind, 5, 7, 4)}
    with unchanged(lm.model):
        each = how.each(lm, sites, texts)
        together = replace(how, **more).together(lm, sites, texts)
    tolerance = 1e-2 if kind in ("llama", "t5-gated") else 1e-6  # these compute their norms in float32
    for i, text in enumerate(texts):
        expected, _ = fine_tuned(lm, [text], USUAL[how], 4)
        same({name: change[i] for name, change in each.items()}, expected, tolerance)
    expected, steps = fine_tuned(lm, texts, USUAL[how], 4, **more)
    same(together, expected, tolerance)
    assert steps == 4


@pytest.mark.parametrize("clip", [1e-9, 1.0])
def test_a_large_gradient_is_clipped(clip: float) -> None:
    """Adam's and RMSprop's first steps hardly see it, but for their eps and in later steps."""
    lm = build_lm("gpt2", torch.float64)
    texts, sites = texts_of(lm, 2), find_sites(lm.model)
    each = replace(RMSPROP, clip=clip).each(lm, sites, texts)
    for i, text in enumerate(texts):
        expected, _ = fine_tuned(lm, [text], USUAL[RMSPROP], 4, clip=clip)
        same({name: change[i] for name, change in each.items()}, expected, 1e-6)


# ----------------------------------------------------------------------------------------- when it stops


@pytest.fixture(scope="module")
def exact() -> LM:
    return build_lm("gpt2", torch.float64)


@pytest.mark.parametrize("until", [None, 2.0])
def test_it_stops_as_soon_as_it_may(exact: LM, until: float | None) -> None:
    texts, sites = texts_of(exact, 3), find_sites(exact.model)
    how = Descent(optimizer=Adam(3e-3), steps=50, until=until)
    usual = partial(torch.optim.Adam, lr=3e-3)
    with unchanged(exact.model):
        each, together = how.each(exact, sites, texts), how.together(exact, sites, texts)
    needed = []
    for i, text in enumerate(texts):
        expected, steps = fine_tuned(exact, [text], usual, 50, until=until)
        same({name: change[i] for name, change in each.items()}, expected, 1e-5)
        needed.append(steps)
    expected, steps = fine_tuned(exact, texts, usual, 50, until=until)
    same(together, expected, 1e-5)
    assert 1 < min(needed) < max(needed) < 50  # they stop, and not all at the same step
    assert 1 < steps < 50


def test_what_the_model_says_already_needs_no_change(exact: LM) -> None:
    (text,) = texts_of(exact, 1)
    answer = plain_logits(exact.model, collate([Text(text.ids[: text.start + 1], text.start)])).argmax(-1)
    known = Text((*text.ids[: text.start], int(answer)), text.start)
    assert said(exact, known)
    each = ADAM.each(exact, find_sites(exact.model), [text, known])
    assert all(change[1].dense().eq(0).all() and change[0].dense().ne(0).any() for change in each.values())


def test_the_edited_model_says_the_target(tiny_llama: LM) -> None:
    texts, sites = texts_of(tiny_llama, 3), find_sites(tiny_llama.model)
    change = replace(ADAM, optimizer=Adam(1e-2), steps=50).together(tiny_llama, sites, texts)
    with applied(tiny_llama.model, change):
        assert all(said(tiny_llama, text) for text in texts)


# ---------------------------------------------------------------------------------------------- batches


def close(found: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    for name, change in found.items():
        torch.testing.assert_close(change.dense(), expected[name].dense(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("leaf", [3, *in_slow_suite(1)])
def test_a_few_at_a_time_are_the_same_edits(exact: LM, leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is done makes room for the next, and each has its own locality texts."""
    texts, sites = texts_of(exact, 5), find_sites(exact.model)
    how = replace(ADAM, steps=9, c_edit=0.5, locality=random_texts("gpt2", 5, 7, 4))
    whole = how.each(exact, sites, texts)
    size = sum(site.d_in * site.d_out for site in sites) * 8 * 3
    monkeypatch.setattr(fitting, "_BYTES", leaf * size)
    monkeypatch.setattr(fitting, "_AHEAD", 2)
    at_once: list[int] = []
    step = fitting._Search._step
    monkeypatch.setattr(
        fitting._Search, "_step", lambda self, moving: at_once.append(len(moving)) or step(self, moving)
    )
    close(how.each(exact, sites, texts), whole)
    assert max(at_once) == leaf


def test_many_texts_of_one_edit_are_read_part_by_part(exact: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, sites = texts_of(exact, 5), find_sites(exact.model)
    whole = ADAM.together(exact, sites, texts)
    monkeypatch.setattr(fitting, "_PASS_TOKENS", 2 * max(text.size for text in texts))
    close(ADAM.together(exact, sites, texts), whole)


def test_the_trunk_runs_once_for_each_text(exact: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, locality = texts_of(exact, 3), random_texts("gpt2", 5, 7, 4)
    read: list[int] = []
    run = Trunk.run
    Trunk(
        exact.model, find_sites(exact.model)
    )  # whether passes resume is tested once for a model, on two texts
    monkeypatch.setattr(Trunk, "run", lambda self, batch: read.append(len(batch)) or run(self, batch))
    replace(ADAM, steps=9, locality=locality).each(exact, find_sites(exact.model), texts)
    assert sum(read) == len(texts) + len(locality)


# --------------------------------------------------------------------------------------------- the rest


def test_the_projection_follows_every_step(exact: LM) -> None:
    (text,) = texts_of(exact, 1)
    sites = find_sites(exact.model)
    half = replace(RMSPROP, project={site.name: lambda change: change.clamp(max=0) / 2 for site in sites})
    found = half.each(exact, sites, [text])
    expected, _ = fine_tuned(exact, [text], USUAL[RMSPROP], 4, project=lambda change: change.clamp(max=0) / 2)
    same({name: change[0] for name, change in found.items()}, expected, 1e-6)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_gradient_that_is_not_finite_is_an_error(tiny_llama: LM) -> None:
    how = Descent(optimizer=RmsProp(1e38), steps=3)
    with pytest.raises(TrainingError, match="not finite after 1 steps: use a smaller learning rate"):
        how.each(tiny_llama, find_sites(tiny_llama.model), texts_of(tiny_llama, 1))


def test_a_model_in_half_precision_has_changes_in_float32() -> None:
    lm = build_lm("llama", torch.bfloat16)
    with unchanged(lm.model):
        found = ADAM.each(lm, find_sites(lm.model), texts_of(lm, 2))
    for change in found.values():
        assert change.left.dtype == change.right.dtype == torch.float32
        assert change.dense().isfinite().all() and change.dense().ne(0).any()
