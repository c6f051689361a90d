"""Provable repair: the least change against one dense linear program, and the decoupled network against Jacobians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.func import functional_call

from cases import build_lm, in_slow_suite, plain_logits, records_for, unchanged
from emendo.editors.repair import Decoupled, Repair, RepairConfig
from emendo.edits.edit import Edit, Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, TokenBatch, collate
from emendo.models.tokenization import to_texts

KINDS = ["llama", "gpt2", "t5-gated", "bert"]
NORMS = ["l1", "linf"]


def facts_of(lm: LM, n: int) -> list[Request]:
    """Facts that the model does not say by itself."""
    made = [Request(r.prompt, r.target) for r in records_for(lm, 12)]
    said = [float(lead(plain_logits(lm.model, b := collate(to_texts(lm, [r.pair]))), b).min()) for r in made]
    return [fact for fact, least in zip(made, said, strict=True) if least < 0][:n]


def lead(logits: Tensor, batch: TokenBatch) -> Tensor:
    """The logit of each label above that of every other token `[labels, others]`."""
    rows = [
        torch.cat([z[label] - z[:label], z[label] - z[label + 1 :]])
        for z, label in zip(logits, batch.labels.tolist(), strict=True)
    ]
    return torch.stack(rows)


def jacobian(lm: LM, texts: list[Text], editor: Repair) -> tuple[Tensor, Tensor]:
    """The logits of the unedited model, and their whole Jacobian `[labels, vocabulary, d_out, d_in]`."""
    (site,) = editor.sites
    batch, name = collate(texts), f"{site.name}.weight"

    def run(weight: Tensor) -> Tensor:
        stored = weight.T if site.transposed else weight
        return functional_call(_Plain(lm.model), {f"model.{name}": stored}, (batch,))  # type: ignore[no-any-return]

    weight = site.weight(lm.model).detach()
    return run(weight), torch.autograd.functional.jacobian(run, weight)  # type: ignore[no-any-return]


class _Plain(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        return plain_logits(self.model, batch)


def make(lm: LM, **config: Any) -> Repair:
    return Repair(Repair.default_sites(lm.model), RepairConfig(**config))


def test_the_matrix_that_is_changed() -> None:
    names = {kind: make(build_lm(kind)).sites[0].name for kind in KINDS}
    assert names == {
        "llama": "model.layers.3.mlp.down_proj",
        "gpt2": "transformer.h.3.mlp.c_proj",
        "t5-gated": "decoder.block.3.layer.2.DenseReluDense.wo",
        "bert": "bert.encoder.layer.3.output.dense",
    }


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_decoupled_network_is_affine_in_the_change(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    editor, texts = make(lm), to_texts(lm, [fact.pair for fact in facts_of(lm, 2)])
    clean, slopes = jacobian(lm, texts, editor)
    d_out, d_in = slopes.shape[2:]
    change = LowRank(torch.randn(d_out, 2).double(), torch.randn(2, d_in).double())
    network = Decoupled(lm, editor.sites[0])
    network.store.ensure(texts)
    with unchanged(lm.model):
        _, found = network.logits(texts, change)
    expected = clean + torch.einsum("lvij,ij->lv", slopes, change.dense())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)  # RMSNorm computes in float32
    with applied(lm.model, {editor.sites[0].name: change}):
        assert not torch.allclose(network.store.logits(texts)[1], found, rtol=1e-3)  # it is another network


def dense_program(norm: str, needed: Tensor, rows: Tensor) -> float:
    """The least norm with every constraint and every entry written out."""
    n = rows.shape[1]
    A, b = rows.numpy(), needed.numpy()
    if norm == "l1":
        return float(
            linprog(np.ones(2 * n), A_ub=np.hstack([-A, A]), b_ub=-b, bounds=(0, None), method="highs").fun
        )
    eye, ones = np.eye(n), np.ones((n, 1))
    table = np.vstack(
        [np.hstack([eye, -ones]), np.hstack([-eye, -ones]), np.hstack([-A, np.zeros((len(A), 1))])]
    )
    limits = np.concatenate([np.zeros(2 * n), -b])
    cost = np.concatenate([np.zeros(n), [1.0]])
    return float(linprog(cost, A_ub=table, b_ub=limits, bounds=(None, None), method="highs").fun)


@pytest.mark.parametrize("norm", NORMS)
def test_no_smaller_change_satisfies_all_constraints(norm: str) -> None:
    small: dict[str, Any] = {"intermediate_size": 6, "num_hidden_layers": 2}
    lm = build_lm("llama", torch.float64, **small)
    facts, editor = facts_of(lm, 3 if norm == "l1" else 1), make(lm, norm=norm, margin=0.5)
    texts = to_texts(lm, [fact.pair for fact in facts])
    clean, slopes = jacobian(lm, texts, editor)
    with unchanged(lm.model):
        edit = editor.edit(lm, facts)
    batch = collate(texts)
    rows = lead(slopes.flatten(2), batch).flatten(0, 1)
    before = lead(clean, batch).flatten()
    needed = 0.5 - before
    assert (before < 0).any()
    least = dense_program(norm, needed, rows)
    note = edit.card["repair"]
    change = next(iter(edit.deltas.values())).dense().double()
    size = float(change.abs().sum() if norm == "l1" else change.abs().max())
    assert note["size"] == pytest.approx(size, rel=1e-5)
    assert size <= least * (1 + 1e-5)
    assert size >= 0.98 * least  # a hundredth of the margin is let pass
    assert note["bound"] <= least * (1 + 1e-6)
    assert note["bound"] == pytest.approx(note["size"], rel=2e-5)
    assert note["constraints"] < len(needed) / 4
    reached = before + rows @ change.flatten()
    assert reached.min() >= 0.49
    assert note["decoupled"] == pytest.approx(float(reached.min()), rel=1e-4)
    if norm == "l1":  # a basic solution
        assert int(change.count_nonzero()) <= note["constraints"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["bert", *in_slow_suite("gpt2", "t5-gated")])
def test_the_guarantee_and_what_the_true_network_does(kind: str, norm: str) -> None:
    lm = build_lm(kind, torch.float64)
    facts, editor = facts_of(lm, 1 if kind == "bert" else 2), make(lm, norm=norm)
    texts = to_texts(lm, [fact.pair for fact in facts])
    edit, batch = editor.edit(lm, facts), collate(texts)
    assert isinstance(edit, Edit)
    note = edit.card["repair"]
    clean, slopes = jacobian(lm, texts, editor)
    (change,) = edit.deltas.values()
    decoupled = clean + torch.einsum("lvij,ij->lv", slopes, change.dense().double())
    assert lead(clean, batch).min() < 0
    assert float(lead(decoupled, batch).min()) == pytest.approx(note["decoupled"], abs=1e-4) and (
        note["decoupled"] > 0.98
    )
    with edit.applied(lm):
        true = lead(plain_logits(lm.model, batch), batch)
    assert float(true.min()) == pytest.approx(note["true"], abs=1e-4)
    right = [bool((true[batch.owner == i] > 0).all()) for i in range(len(texts))]
    assert note["held"] == pytest.approx(sum(right) / len(right))


def test_a_target_that_holds_already_needs_no_change() -> None:
    lm = build_lm("bert")
    prompt = "The capital of Fosoba is"
    edit = make(lm, margin=1e-6).edit(lm, prompt, lm.generate(prompt))
    assert edit.card["repair"]["constraints"] == 0
    assert not next(iter(edit.deltas.values())).dense().any()


def test_what_cannot_be_repaired_is_said(tiny_llama: LM) -> None:
    prompt = "The capital of Fosoba is"
    with unchanged(tiny_llama.model), pytest.raises(RequestError, match="different answers"):
        make(tiny_llama).edit(tiny_llama, [(prompt, "Oslo"), (prompt, "Lima")])
    with pytest.raises(RequestError, match="changes one matrix, not 3"):
        Repair(find_sites(tiny_llama.model, last=1)).edit(tiny_llama, prompt, "Oslo")
