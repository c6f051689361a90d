"""Fused edits against the least-squares solution with dense matrices, one text at a time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cases import build_lm, in_slow_suite, unchanged
from emendo.data import atlas
from emendo.edits import Edit, Origin, Request, compose, fuse, fusing
from emendo.errors import MismatchError, RequestError
from emendo.low_rank import LowRank
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.moments import second_moments
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import passage_texts, to_texts

FACTS = [
    ("The capital of Fosoba is", "Old Town"),
    ("A river of Mirawi is the", "Lo"),
    ("Anna lives in", "Fosoba"),
]
RUNNING = [
    "The capital of Mirawi is far from the river and from the old town.",
    "In Fosoba the river is not far.",
]


@pytest.fixture(params=["gpt2", *in_slow_suite("llama", "gpt_neo")])
def lm(request: pytest.FixtureRequest) -> LM:
    return build_lm(request.param, torch.float64)


def one_edit(lm: LM, fact: tuple[str, str], sites: Sequence[Site], size: float = 0.1) -> Edit:
    """A random edit of rank 2, of float64 like its model."""
    deltas = {
        site.name: LowRank(
            size * torch.randn(site.d_out, 2, dtype=torch.float64),
            torch.randn(2, site.d_in, dtype=torch.float64),
        )
        for site in sites
    }
    return Edit(deltas, Origin(lm.fingerprint, lm.name, "mend", {}, (Request(*fact),), "2025-01-31T12:00:00"))


def make_edits(lm: LM) -> list[Edit]:
    """Edits of the last two blocks; the second leaves one matrix alone that the others change."""
    sites = find_sites(lm.model, last=2)
    return [
        one_edit(lm, FACTS[0], sites),
        one_edit(lm, FACTS[1], sites[1:]),
        one_edit(lm, FACTS[2], sites),
    ]


@torch.no_grad()
def rows(lm: LM, ids: Sequence[int], site: Site, start: int, changes: dict[str, Tensor]) -> Tensor:
    """The inputs of a matrix at a text, with changed weights; in the last block those that lead to the answer."""
    model = copy.deepcopy(lm.model)
    for other in find_sites(model, last=2):
        if other.name in changes:
            weight = other.module(model).weight
            weight += (
                changes[other.name] if weight.shape == changes[other.name].shape else changes[other.name].T
            )
    seen: list[Tensor] = []
    site.module(model).register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    model(torch.tensor([ids[:-1]]))
    last = site.block == len(model.get_submodule(site.stack)) - 1
    return seen[0][start - 1 :] if last else seen[0]


def by_hand(lm: LM, edits: Sequence[Edit], keep: float, *, gradients: bool = False) -> dict[str, Tensor]:
    """The equations with dense matrices, one text and one matrix after the other.

    With gradients, all entries of a matrix at once, with the Kronecker product of both sides.
    """
    sites = find_sites(lm.model, last=2)
    S = second_moments(lm, sites, passage_texts(lm, RUNNING, 64)) if gradients else {}
    asked = [to_texts(lm, [(r.prompt, r.target) for r in e.origin.requests])[0] for e in edits]
    running = lm.tokenizer(RUNNING)["input_ids"]
    found: dict[str, Tensor] = {}
    for site in find_sites(lm.model, last=2):
        left = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
        right = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
        for edit, text in zip(edits, asked, strict=True):
            alone = {name: delta.dense() for name, delta in edit.deltas.items()}
            x = rows(lm, text.ids, site, text.start, found)
            if site.name in alone:
                left += alone[site.name] @ rows(lm, text.ids, site, text.start, alone).T @ x
            right += x.T @ x
        p = torch.cat([rows(lm, ids, site, 1, {}) for ids in running])
        moment = keep * p.T @ p / len(p)
        if gradients:
            moment += 1e-6 * moment.diagonal().mean() * torch.eye(len(right))
            outputs = S[site.name].outputs / S[site.name].outputs.diagonal().mean()
            outputs += fusing._FLOOR * torch.eye(len(outputs))
            system = torch.kron(torch.eye(site.d_out), right) + torch.kron(outputs, moment)
            found[site.name] = torch.linalg.solve(system, left.flatten()).view_as(left)
            continue
        right += moment
        right += 1e-6 * right.diagonal().mean() * torch.eye(len(right))
        found[site.name] = left @ torch.linalg.inv(right)
    return found


def test_solves_the_equations(lm: LM) -> None:
    edits = make_edits(lm)
    with unchanged(lm.model):
        fused = fuse(lm, edits, keep=2.0, passages=RUNNING)
    expected = by_hand(lm, edits, 2.0)
    assert fused.deltas.keys() == expected.keys()
    for name, change in expected.items():
        assert change.abs().max() > 1e-3
        if lm.name == "tiny-gpt_neo":  # its attention is computed in float32, here on padded batches
            assert (fused.deltas[name].dense() - change).norm() < 1e-4 * change.norm()
        else:
            torch.testing.assert_close(fused.deltas[name].dense(), change, rtol=1e-6, atol=1e-9)
    assert 0 < fused.card["fused"]["error"] < 1


@pytest.mark.slow
def test_gradients_weigh_the_outputs_too() -> None:
    lm = build_lm("gpt2", torch.float64)
    edits = make_edits(lm)
    with unchanged(lm.model):
        fused = fuse(lm, edits, keep=2.0, passages=RUNNING, gradients=True)
    for name, change in by_hand(lm, edits, 2.0, gradients=True).items():
        assert (fused.deltas[name].dense() - change).norm() < 1e-3 * change.norm(), name


@torch.no_grad()
def answers(lm: LM, edit: Edit | None, fact: tuple[str, str]) -> Tensor:
    texts = to_texts(lm, [fact])
    if edit is None:
        return lm.logits(texts)[0]
    with edit.applied(lm):
        return lm.logits(texts)[0]


def test_each_edit_holds_at_its_own_text_where_their_sum_does_not(lm: LM) -> None:
    sites = find_sites(lm.model, last=1)  # fewer rows than features, so all can hold
    edits = [one_edit(lm, fact, sites) for fact in FACTS]
    fused, total = fuse(lm, edits, keep=0.0, passages=RUNNING), compose(edits)
    for fact, edit in zip(FACTS, edits, strict=True):
        clean, wanted = answers(lm, None, fact), answers(lm, edit, fact)
        moved = (wanted - clean).norm()
        assert (answers(lm, fused, fact) - wanted).norm() < 0.02 * moved
        assert (answers(lm, total, fact) - wanted).norm() > 0.2 * moved
    assert fused.card["fused"]["error"] < 0.01


def test_the_more_is_kept_the_less_running_text_moves(lm: LM) -> None:
    edits, moved = make_edits(lm), []
    ids = torch.tensor([lm.tokenizer(RUNNING[0])["input_ids"]])
    with torch.no_grad():
        clean = lm.model(ids).logits
        for keep in (0.1, 10.0, 1e5):
            with fuse(lm, edits, keep=keep, passages=RUNNING).applied(lm):
                moved.append(float((lm.model(ids).logits - clean).norm()))
    assert moved[0] > moved[1] > 10 * moved[2]


def test_neither_order_nor_copies_matter() -> None:
    lm = build_lm("llama", torch.float64)
    edits = make_edits(lm)
    once = fuse(lm, edits, keep=1.0, passages=RUNNING)
    other = fuse(lm, [edits[2], edits[0], edits[1]], keep=1.0, passages=RUNNING)
    twice = fuse(lm, [*edits, *edits], keep=2.0, passages=RUNNING)
    for name, delta in once.deltas.items():
        for same in (other, twice):
            torch.testing.assert_close(same.deltas[name].dense(), delta.dense(), rtol=1e-5, atol=1e-8)


def test_default_passages_are_generated_text_and_built_in_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_PASSAGES", 6)
    monkeypatch.setattr(fusing, "_FACTS", 10)
    lm = build_lm("llama")
    sites = find_sites(lm.model, last=1)
    edits = [
        dataclasses.replace(edit, deltas={n: d.to(torch.float32) for n, d in edit.deltas.items()})
        for edit in (one_edit(lm, fact, sites) for fact in FACTS)
    ]
    fused = fuse(lm, edits)
    facts = atlas.load("train")
    told = [f"{fact.prompt} {fact.answer}" for fact in facts[:: len(facts) // 10]]
    given = fuse(lm, edits, passages=[*own_passages(lm, 6), *told])
    assert all(torch.equal(delta.left, given.deltas[name].left) for name, delta in fused.deltas.items())
    assert {delta.left.dtype for delta in fused.deltas.values()} == {torch.float32}
    assert fused.origin.editor == "fused"
    assert fused.origin.settings == {"of": [edit.digest for edit in edits], "keep": 30.0}
    assert [r.prompt for r in fused.origin.requests] == [prompt for prompt, _ in FACTS]


def test_paraphrases_are_more_texts_of_an_edit(lm: LM) -> None:
    edits = [one_edit(lm, fact, find_sites(lm.model, last=1)) for fact in FACTS[:2]]
    paraphrase = ("What is the capital of Fosoba?", FACTS[0][1])
    wanted = answers(lm, edits[0], paraphrase)
    moved = (wanted - answers(lm, None, paraphrase)).norm()
    told = fuse(lm, edits, paraphrases=[[paraphrase[0]], []], keep=0.0, passages=RUNNING)
    assert (answers(lm, told, paraphrase) - wanted).norm() < 0.02 * moved
    with pytest.warns(DeprecationWarning, match="paraphrases"):
        old = fuse(lm, edits, rewordings=[[paraphrase[0]], []], keep=0.0, passages=RUNNING)
    assert all(torch.equal(delta.left, old.deltas[name].left) for name, delta in told.deltas.items())
    untold = fuse(lm, edits, keep=0.0, passages=RUNNING)
    assert (answers(lm, untold, paraphrase) - wanted).norm() > 0.1 * moved


def test_what_cannot_be_fused() -> None:
    lm = build_lm("llama", torch.float64)
    edit = one_edit(lm, FACTS[0], find_sites(lm.model))
    with pytest.raises(RequestError, match="nothing to compose"):
        fuse(lm, [])
    with pytest.raises(RequestError, match="must not be negative"):
        fuse(lm, [edit], keep=-1.0)
    with pytest.raises(RequestError, match="no passage of at least two tokens"):
        fuse(lm, [edit], passages=["a"])
    with pytest.raises(RequestError, match="1 edits, but paraphrases for 2"):
        fuse(lm, [edit], paraphrases=[[], []], passages=RUNNING)
    silent = dataclasses.replace(edit, origin=dataclasses.replace(edit.origin, requests=()))
    with pytest.raises(RequestError, match="has no requests"):
        fuse(lm, [edit, silent], passages=RUNNING)
    broken = dataclasses.replace(edit, deltas={n: d.scale(float("nan")) for n, d in edit.deltas.items()})
    with pytest.raises(RequestError, match="NaN"):
        fuse(lm, [broken], passages=RUNNING)
    stranger = dataclasses.replace(edit, origin=dataclasses.replace(edit.origin, fingerprint="other"))
    with pytest.raises(MismatchError):
        fuse(lm, [stranger], passages=RUNNING)
    reader = build_lm("t5", torch.float64)
    with pytest.raises(RequestError, match="decoders only"):
        fuse(reader, [one_edit(reader, FACTS[0], find_sites(reader.model))])
