"""Fused edits of experts against least squares with each expert's dense weights, token by token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import in_slow_suite, unchanged
from emendo.edits import Edit, Origin, Request, fuse
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import to_texts
from mixtures import EXPERTS, MIXTURES, build_mixture, mixture

FACTS = [("The capital of Fosoba is", "Old Town"), ("Anna lives in", "Fosoba")]
RUNNING = ["The capital of Mirawi is far from the river.", "In Fosoba the river is not far."]
BLOCKS = (2, 3)


def one_edit(lm: LM, fact: tuple[str, str], sites: Sequence[Site]) -> Edit:
    deltas = {
        site.name: LowRank(
            0.3 * torch.randn(site.d_out, 2, dtype=torch.float64),
            torch.randn(2, site.d_in, dtype=torch.float64),
        )
        for site in sites
    }
    return Edit(deltas, Origin(lm.fingerprint, lm.name, "mend", {}, (Request(*fact),), "2025-01-31T12:00:00"))


@torch.no_grad()
def inputs(plain: Any, ids: Sequence[int], start: int, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each expert's inputs ``[tokens, d_in]``, zero where it is not asked, of a model with changed fused parameters."""
    model = copy.deepcopy(plain)
    for name, change in changes.items():
        owner, expert, parameter = name.rsplit(".", 2)
        experts: Any = model.get_submodule(owner)
        getattr(experts, parameter)[int(expert)] += change.T if experts.is_transposed else change
    calls: dict[int, tuple[Tensor, Tensor]] = {}
    for block in BLOCKS:
        model.model.layers[block].mlp.experts.register_forward_pre_hook(
            lambda module, args, block=block: calls.update({block: args[:2]})
        )
    model(torch.tensor([ids[:-1]]))
    found: dict[str, Tensor] = {}
    for block, (hidden, chosen) in calls.items():
        experts = model.model.layers[block].mlp.experts
        tokens = range(start - 1 if block == BLOCKS[-1] else 0, len(hidden))  # those that lead to the answer
        for expert in range(EXPERTS):
            up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            bias = experts.gate_up_proj_bias[expert] if experts.has_bias else 0
            x, inner = [], []
            for token in tokens:
                row = hidden[token] if expert in chosen[token] else torch.zeros_like(hidden[token])
                between = experts._apply_gate(
                    (row @ (up if experts.is_transposed else up.T) + bias).unsqueeze(0)
                )
                x.append(row)
                inner.append(between[0] if expert in chosen[token] else torch.zeros_like(between[0]))
            name = f"model.layers.{block}.mlp.experts.{expert}"
            found[f"{name}.gate_up_proj"], found[f"{name}.down_proj"] = torch.stack(x), torch.stack(inner)
            assert found[f"{name}.down_proj"].shape[1] == (down if experts.is_transposed else down.T).shape[0]
    return found


def by_hand(lm: LM, kind: str, edits: Sequence[Edit], keep: float) -> dict[str, Tensor]:
    plain = mixture(kind, torch.float64)
    asked = [to_texts(lm, [r.pair for r in edit.origin.requests])[0] for edit in edits]
    alone = [{name: delta.dense() for name, delta in edit.deltas.items()} for edit in edits]
    wanted = [
        {name: x @ own[name].T for name, x in inputs(plain, text.ids, text.start, own).items() if name in own}
        for own, text in zip(alone, asked, strict=True)
    ]
    running = [inputs(plain, ids, 1, {}) for ids in lm.tokenizer(RUNNING)["input_ids"]]
    found: dict[str, Tensor] = {}
    for site in find_sites(lm.model, last=2):
        now = [inputs(plain, text.ids, text.start, found)[site.name] for text in asked]
        left = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
        for x, y in zip(now, wanted, strict=True):
            if site.name in y:
                left += y[site.name].T @ x
        p = torch.cat([own[site.name] for own in running])
        right = sum(x.T @ x for x in now) + keep * p.T @ p / len(p)
        if any(x.any() for x in now):
            right += 1e-6 * right.diagonal().mean() * torch.eye(len(right), dtype=torch.float64)
            found[site.name] = left @ torch.linalg.inv(right)
    return found


@pytest.mark.parametrize("kind", [*MIXTURES[:1], *in_slow_suite(*MIXTURES[1:])])
def test_solves_the_equations_of_every_expert(kind: str) -> None:
    lm = build_mixture(kind, torch.float64)
    sites = find_sites(lm.model, last=2)
    edits = [one_edit(lm, FACTS[0], sites), one_edit(lm, FACTS[1], sites[3:])]
    with unchanged(lm.model):
        fused = fuse(lm, edits, keep=0.5, passages=RUNNING)
    expected = by_hand(lm, kind, edits, 0.5)
    assert fused.deltas.keys() == expected.keys()
    assert sum(float(change.norm()) > 1e-3 for change in expected.values()) > len(expected) // 2
    for name, change in expected.items():
        found = fused.deltas[name].dense()
        assert float((found - change).norm()) < 1e-4 * float(change.norm()) + 1e-9, name
    assert 0 < fused.card["fused"]["error"] < 1


def test_each_edit_holds_at_its_own_text() -> None:
    lm = build_mixture("mixtral", torch.float64)
    edits = [one_edit(lm, fact, find_sites(lm.model, last=1)) for fact in FACTS]
    fused = fuse(lm, edits, keep=0.0, passages=RUNNING)
    for fact, edit in zip(FACTS, edits, strict=True):
        text = to_texts(lm, [fact])
        clean = lm.logits(text)[0]
        with edit.applied(lm):
            wanted = lm.logits(text)[0]
        with fused.applied(lm):
            found = lm.logits(text)[0]
        assert (found - wanted).norm() < 0.02 * (wanted - clean).norm()
    assert fused.card["fused"]["error"] < 0.01
