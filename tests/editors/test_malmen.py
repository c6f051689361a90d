"""MALMEN's solve and its gradient against dense float64, many facts as one, and training with edits of many sizes."""

from __future__ import annotations

import pytest
import torch

from cases import build_lm, records, unchanged
from emendo.editors.gradient import edit_factors
from emendo.editors.malmen import Malmen, MalmenConfig, solved
from emendo.edits.edit import Request
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.train import TrainConfig, train


def requests(count: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records(count)]


def editor_of(lm: LM) -> Malmen:
    torch.manual_seed(0)
    editor = Malmen(find_sites(lm.model, last=1), MalmenConfig(rank=8, eta=1e-2, ridge=0.5)).double()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return editor.eval()


@pytest.mark.parametrize("rows", [3, 12])
def test_the_solve_and_its_gradients_are_those_of_the_paper(rows: int) -> None:
    """``dL/dD = K M`` and ``dL/dlog lambda = -lambda <M, S>`` with ``M = (K^T K + lambda I)^-1 G`` (section 4.2)."""
    torch.manual_seed(0)
    K = torch.randn(rows, 6, dtype=torch.float64)
    D = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    log_ridge = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    G = torch.randn(6, 4, dtype=torch.float64)
    S = solved(K, log_ridge.exp()).mT @ D
    ridge = log_ridge.exp().detach()
    system = K.mT @ K + ridge * torch.eye(6)
    torch.testing.assert_close(S, torch.linalg.solve(system, K.mT @ D))
    to_values, to_ridge = torch.autograd.grad((S * G).sum(), [D, log_ridge])
    M = torch.linalg.solve(system, G)
    torch.testing.assert_close(to_values, K @ M)
    torch.testing.assert_close(to_ridge, -ridge * (M * S).sum())


def test_many_facts_are_one_dense_solution_however_they_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm("llama", torch.float64)
    editor, facts = editor_of(lm), requests(7)
    texts = to_texts(lm, [(fact.prompt, fact.target) for fact in facts])
    with unchanged(lm.model), torch.no_grad():
        found = editor.together(lm, facts)
        factors = edit_factors(Trunk(lm.model, editor.sites), editor.sites, texts)
        values = editor.rows(factors)
        grouped = editor.grouped(factors, 7)
        for index, site in enumerate(editor.sites):
            K, V = factors[site.name].u, values[site.name]
            ridge = editor.log_ridge[index].exp() * torch.eye(site.d_in)
            expected = V.mT @ K @ torch.linalg.inv(K.mT @ K + ridge)
            torch.testing.assert_close(found[site.name].dense(), expected)
            torch.testing.assert_close(grouped[site.name].dense()[0], expected)
        monkeypatch.setattr(
            "emendo.editors.malmen.in_batches", lambda texts: [[i] for i in range(len(texts))]
        )
        for name, change in editor.together(lm, facts).items():
            torch.testing.assert_close(change.dense(), found[name].dense())


def test_training_goes_through_edits_of_all_sizes_and_lowers_the_loss() -> None:
    lm = build_lm("llama")
    torch.manual_seed(0)
    editor = Malmen(find_sites(lm.model, last=2), MalmenConfig(rank=8, eta=1e-3))
    sizes = []

    def noted(episodes: int, together: int, facts=editor.facts_in_an_edit) -> int:  # type: ignore[no-untyped-def]
        sizes.append(facts(episodes, together))
        return sizes[-1]

    editor.facts_in_an_edit = noted  # type: ignore[method-assign]
    before = [parameter.clone() for parameter in editor.parameters()]
    train(lm, editor, records(16), [], TrainConfig(steps=6, batch=4, lr=1e-3, warmup=0))
    assert set(sizes) == {1, 2, 4}
    assert any(not torch.equal(a, b) for a, b in zip(before, editor.parameters(), strict=True))
    assert int(editor.steps) == 6
