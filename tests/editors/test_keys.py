"""MEMIT and AlphaEdit against dense solves in float64, one block after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import build_lm, records, unchanged
from emendo.editors._keys import Found, KeyEditor, rescaled
from emendo.editors.alphaedit import AlphaEdit, AlphaEditConfig, null_space
from emendo.editors.memit import Memit, MemitConfig
from emendo.edits.edit import Request
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import Site

FAST: dict[str, Any] = {"steps": 2, "lr": 0.2, "contexts": 2}
EDITORS = [(Memit, MemitConfig(**FAST, covariance=2.0)), (AlphaEdit, AlphaEditConfig(**FAST, threshold=2.0))]
torch.manual_seed(0)


def requests(count: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records(count)]


def dense_keys(lm: LM, site: Site, fact: Found) -> Tensor:
    """The mean input of a matrix at the subject, each text by itself through the whole model."""
    seen: list[Tensor] = []
    for text, end in zip(fact.texts, fact.ends, strict=True):
        with site.module(lm.model).register_forward_pre_hook(
            partial(lambda end, module, args: seen.append(args[0][0, end]), end)
        ):
            lm.model(torch.tensor([text.inputs]))
    return torch.stack(seen).mean(0)


def reference(editor: KeyEditor, site: Site, K: Tensor, R: Tensor, C: Tensor) -> Tensor:
    """The published equations, with columns for facts as there."""
    K, R, eye = K.mT, R.mT, torch.eye(len(C), dtype=torch.float64)
    if isinstance(editor, Memit):
        return R @ K.mT @ torch.linalg.inv(editor.config.covariance * C + K @ K.mT)
    assert isinstance(editor, AlphaEdit)
    values, vectors = torch.linalg.eigh(C)
    U = vectors[:, values < editor.config.threshold * values.mean()]
    P, ridge = U @ U.mT, editor.config.identity * K.square().mean()
    return R @ K.mT @ P @ torch.linalg.inv(K @ K.mT @ P + ridge * eye)


@pytest.mark.parametrize(("kind", "config"), EDITORS)
def test_each_block_is_the_dense_solution_on_the_keys_that_it_then_gets(
    kind: type[KeyEditor], config: Any
) -> None:
    lm = build_lm("llama", torch.float64, num_hidden_layers=4)
    sites = kind.default_sites(lm.model)
    sites = (
        *sites,
        *(Site(**{**_values(sites[0]), "name": sites[0].name.replace(".1.", ".2."), "block": 2}),),
    )
    editor = kind(sites, config)
    with unchanged(lm.model), torch.no_grad():
        changes = editor.together(lm, requests(3))
        facts = [editor.found(lm, request) for request in requests(3)]
        left = torch.stack([fact.value for fact in facts]).double()
        done: dict[str, LowRank] = {}
        for number, site in enumerate(sites):
            with applied(lm.model, done):
                K = torch.stack([dense_keys(lm, site, fact) for fact in facts])
            C = editor.moments(lm)[site.name]
            expected = reference(editor, site, K, left / (len(sites) - number), C)
            assert changes[site.name].rank == 3
            torch.testing.assert_close(changes[site.name].dense(), expected, rtol=1e-4, atol=1e-8)
            done[site.name] = changes[site.name]
            left = left - K @ changes[site.name].dense().mT


def _values(site: Site) -> dict[str, Any]:
    return {name: getattr(site, name) for name in Site.__dataclass_fields__}


def drawn(d: int = 6, out: int = 4, facts: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, residuals, keys of earlier edits, and a moment of rank 3."""
    K0 = torch.randn(d, 3, dtype=torch.float64)
    rows = (torch.randn(n, m, dtype=torch.float64) for n, m in ((facts, d), (facts, out), (2, d)))
    return (*rows, K0 @ K0.mT)


def site_of(d_in: int, d_out: int) -> Site:
    return Site("m", d_in, d_out, "blocks", 0, False, False)


def test_alphaedit_has_the_identities_of_its_paper() -> None:
    """Eq. 14 is stationary, its code's form is the same, and what running text reads is not answered."""
    K, R, earlier, moment = drawn()
    editor = AlphaEdit((site_of(6, 4),), AlphaEditConfig(threshold=1e-6))
    editor.earlier["m"] = earlier.mT @ earlier
    D = editor.solved(site_of(6, 4), K, R, moment).dense()
    basis = null_space(moment, 1e-6)
    P, K1, Kp = basis @ basis.mT, K.mT, earlier.mT
    assert basis.shape[1] == 3
    ridge = editor.config.identity * K.square().mean()
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        D, R.mT @ K1.mT @ P @ torch.linalg.inv(Kp @ Kp.mT @ P + K1 @ K1.mT @ P + ridge * eye)
    )
    torch.testing.assert_close(
        D, torch.linalg.solve(P @ (K1 @ K1.mT + Kp @ Kp.mT) + ridge * eye, P @ K1 @ R).mT
    )
    torch.testing.assert_close(D @ P, D)
    assert (D @ moment).norm() < 1e-9 * D.norm() * moment.norm()
    slope = (D @ K1 - R.mT) @ K1.mT @ P + ridge * D + D @ Kp @ Kp.mT @ P
    assert slope.norm() < 1e-9 * R.norm()


def test_memit_keeps_the_keys_of_earlier_edits() -> None:
    K, R, earlier, moment = drawn()
    editor = Memit((site_of(6, 4),), MemitConfig(covariance=0.5))
    alone = editor.solved(site_of(6, 4), K, R, moment + 0.1 * torch.eye(6)).dense()
    editor.earlier["m"] = earlier.mT @ earlier
    D = editor.solved(site_of(6, 4), K, R, moment + 0.1 * torch.eye(6)).dense()
    system = 0.5 * (moment + 0.1 * torch.eye(6)) + earlier.mT @ earlier + K.mT @ K
    torch.testing.assert_close(D, (torch.linalg.inv(system) @ K.mT @ R).mT)
    assert (D @ earlier.mT).norm() < (alone @ earlier.mT).norm()


def test_the_keys_of_earlier_edits_are_those_of_their_requests() -> None:
    lm = build_lm("llama", torch.float64)
    editor = Memit(Memit.default_sites(lm.model), MemitConfig(**FAST))
    editor.continue_from(lm, requests(2))
    facts = [editor.found(lm, request) for request in requests(2)]
    for site in editor.sites:
        with torch.no_grad():
            K = torch.stack([dense_keys(lm, site, fact) for fact in facts])
        torch.testing.assert_close(editor.earlier[site.name], K.mT @ K)
    editor.continue_from(lm, requests(3)[2:])
    assert all(int(torch.linalg.matrix_rank(own)) == 3 for own in editor.earlier.values())


def test_rescaled_states_have_the_norm_of_the_clean_model() -> None:
    hidden, values = (scale * torch.randn(5, 4, dtype=torch.float64) for scale in (1.0, 0.1))
    values[2] *= 1000
    found, kept = rescaled(values, hidden)
    assert kept.tolist() == [True, True, False, True, True]
    usual = hidden.norm(dim=1).mean()
    torch.testing.assert_close((found + hidden[kept]).norm(dim=1), usual.expand(4))


def test_rescaling_leaves_facts_out() -> None:
    lm = build_lm("llama", torch.float64)
    editor = Memit(Memit.default_sites(lm.model), MemitConfig(**FAST, rescale=True))
    assert all(change.rank <= 2 for change in editor.together(lm, requests(2)).values())
