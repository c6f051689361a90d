"""Breadth-first fine-tuning against Adam of torch through the whole model; the subspace of CrispEdit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from cases import build_lm, plain_logits, records, unchanged
from emendo.editors._breadth import BreadthSettings, Facts, Search, Subspace
from emendo.editors._contexts import Surroundings
from emendo.editors.crisp import Crisp, CrispConfig, low_curvature
from emendo.editors.locft import Locft, LocftConfig
from emendo.edits.edit import Request
from emendo.low_rank import LowRank, applied
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.moments import PASSAGES, TOKENS, second_moments
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import passage_texts

PLAIN = {"contexts": 0, "per_epoch": 0, "c_kl": 0.0, "stay": 0}


def requests(count: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records(count)]


def nll(lm: LM, text: Text) -> torch.Tensor:
    return cross_entropy(plain_logits(lm.model, collate([text])), torch.tensor(text.labels))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_steps_are_those_of_adam_through_the_whole_model(kind: str) -> None:
    """The reference reads every text by itself, with logits and no trunk."""
    lm = build_lm(kind, torch.float64)
    sites = find_sites(lm.model, last=2)
    config = BreadthSettings(
        epochs=3, batch=3, lr=1e-3, until=1e-9, contexts=4, per_epoch=2, c_kl=0.5, stay=2
    )
    facts = Facts.of(lm, requests(3), Surroundings(lm), config)
    with unchanged(lm.model):
        found = Search(lm, sites, config, facts, {}).run()
    dense = {site.name: torch.zeros(site.d_out, site.d_in, dtype=torch.float64) for site in sites}
    leaves = [nn.Parameter(own) for own in dense.values()]
    adam = torch.optim.Adam(leaves, 1e-3)
    for epoch in range(3):
        changes = {name: LowRank.from_dense(leaf) for name, leaf in zip(dense, leaves, strict=True)}
        stay = [texts[(epoch * 2 + i) % len(texts)] for texts in facts.stay for i in range(2)]
        before = [plain_logits(lm.model, collate([text])).log_softmax(-1) for text in stay]
        loss = torch.zeros((), dtype=torch.float64)
        with applied(lm.model, changes):
            for texts in facts.taught:
                some = [texts[1 + (epoch * 2 + i) % 4] for i in range(2)]
                loss = loss + (nll(lm, texts[0]) + sum(nll(lm, text) for text in some) / 2) / 3
            for old, text in zip(before, stay, strict=True):
                new = plain_logits(lm.model, collate([text])).log_softmax(-1)
                loss = loss + 0.5 * kl_div(new, old, log_target=True, reduction="batchmean") / len(stay)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for (name, change), leaf in zip(found.items(), leaves, strict=True):
        assert leaf.abs().max() > 1e-3
        torch.testing.assert_close(change.dense(), leaf.detach(), rtol=1e-3, atol=1e-6, msg=name)


def test_a_fact_that_is_learnt_rests_and_the_search_ends() -> None:
    lm = build_lm("llama")
    sites = find_sites(lm.model, last=1)
    config = LocftConfig(epochs=60, batch=3, lr=0.01, until=1.3, end=False, **PLAIN)
    facts = Facts.of(lm, requests(3), Surroundings(lm), config)
    search = Search(lm, sites, config, facts, {})
    changes = search.run()
    assert 3 < search.steps < config.epochs
    with applied(lm.model, changes):
        assert all(float(nll(lm, texts[0])) < 1.3 for texts in facts.taught)


def test_the_end_of_text_is_taught_after_a_target() -> None:
    lm = build_lm("llama")
    plain, ended = (
        Facts.of(lm, requests(2), Surroundings(lm), BreadthSettings(end=end, **PLAIN))
        for end in (False, True)
    )
    for one, other in zip(plain.taught, ended.taught, strict=True):
        assert other[0].ids == (*one[0].ids, lm.tokenizer.eos_token_id)
        assert other[0].start == one[0].start
    bert = build_lm("bert")
    request = Request("Oslo is a", bert.labels[0])
    (texts,) = Facts.of(bert, [request], Surroundings(bert), BreadthSettings(**PLAIN)).taught
    assert len(texts[0].labels) == 1


def test_low_curvature_leaves_out_the_coordinates_that_hold_the_share() -> None:
    torch.manual_seed(0)
    A, S = (
        m.mT @ m for m in (torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64))
    )
    space = low_curvature(A, S, 0.8)
    a, s = torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(S)
    curvature = s[:, None] * a[None]
    left_out = curvature[space.mask == 0]
    assert left_out.sum() >= 0.8 * curvature.sum() > left_out.sum() - left_out.min()
    assert left_out.min() >= curvature[space.mask == 1].max()
    assert low_curvature(A, S, 0.0).mask.eq(1).all()
    assert low_curvature(A, S, 1.0).mask.eq(0).all()


def test_the_projection_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    A, S = (
        m.mT @ m for m in (torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64))
    )
    U_A, U_S = torch.linalg.eigh(A)[1], torch.linalg.eigh(S)[1]
    Q, M = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5).gt(0.5).double()
    found = Subspace(U_S, U_A, M).project(Q)
    torch.testing.assert_close(found, U_S @ ((U_S.mT @ Q @ U_A) * M) @ U_A.mT)
    torch.testing.assert_close(Subspace(U_S, U_A, M).project(found), found)


def test_crisp_stays_in_the_subspace_and_takes_earlier_edits_into_it() -> None:
    lm = build_lm("llama")
    editor = Crisp(find_sites(lm.model, last=1), CrispConfig(epochs=2, batch=2, lr=0.01, gamma=0.6, **PLAIN))
    facts = requests(4)
    with unchanged(lm.model):
        spaces = editor.subspaces(lm)
        changes = editor.together(lm, facts[:2])
        for name, change in changes.items():
            dense = change.dense()
            assert dense.norm() > 0
            torch.testing.assert_close(spaces[name].project(dense), dense, rtol=1e-3, atol=1e-6)
        editor.continue_from(lm, facts[:2])
        later = editor.subspaces(lm)
    own = second_moments(lm, editor.sites, editor.texts(lm, facts[:2]))
    text = second_moments(lm, editor.sites, passage_texts(lm, own_passages(lm, PASSAGES), TOKENS))
    for name, space in later.items():
        both = text[name].averaged(own[name])
        expected = low_curvature(both.inputs, both.outputs, 0.6)
        assert not torch.equal(space.mask, spaces[name].mask) or not torch.allclose(
            space.left, spaces[name].left
        )
        Q = torch.randn(space.mask.shape)
        torch.testing.assert_close(space.project(Q), expected.project(Q), rtol=1e-2, atol=1e-2)


def test_many_facts_cost_no_more_memory_than_the_matrices() -> None:
    lm = build_lm("llama")
    editor = Locft(find_sites(lm.model, last=1), LocftConfig(epochs=1, batch=50, **PLAIN))
    for site in editor.sites:
        assert editor.together(lm, requests(100))[site.name].rank <= min(site.shape)
