"""Fused edits that come and go, against the solution for those that are in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import build_lm, unchanged
from edits.test_fusing import FACTS, RUNNING, one_edit
from emendo.edits import Edit, Request
from emendo.edits.fusing import input_moments, rows_of, with_ridge
from emendo.edits.incremental import FusedEdits
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache


@pytest.fixture
def lm() -> LM:
    return build_lm("gpt2", torch.float64)


def edits_of(lm: LM) -> list[Edit]:
    torch.manual_seed(0)
    return [one_edit(lm, fact, find_sites(lm.model, last=2)) for fact in FACTS]


def anew(lm: LM, edits: list[Edit], keep: float) -> dict[str, Tensor]:
    """The dense solution for some edits, with the rows of the clean model."""
    sites = find_sites(lm.model, last=2)
    store = TrunkCache(Trunk(lm.model, sites), dtype=torch.float64)
    running = passage_texts(lm, RUNNING, 64)
    own = [to_texts(lm, [edit.origin.requests[0].pair]) for edit in edits]
    store.ensure([*running, *(text for texts in own for text in texts)])
    moments = input_moments(store, running)
    found = {}
    for site in sites:
        X, Y = [], []
        for edit, texts in zip(edits, own, strict=True):
            X.append(rows_of(store, texts)[site.name].rows)
            with edit.applied(lm):
                Y.append(rows_of(store, texts)[site.name].rows @ edit.deltas[site.name].dense().mT)
        x, y = torch.cat(X), torch.cat(Y)
        found[site.name] = (torch.linalg.inv(x.mT @ x + with_ridge(keep * moments[site.name])) @ x.mT @ y).mT
    return found


def check(edit: Edit, expected: dict[str, Tensor]) -> None:
    for name, dense in expected.items():
        error = (edit.deltas[name].dense() - dense).norm()
        assert error <= 1e-6 * dense.norm(), name


@torch.no_grad()
def test_edits_come_and_go_as_if_solved_anew(lm: LM) -> None:
    edits = edits_of(lm)
    fused = FusedEdits(lm, find_sites(lm.model, last=2), keep=3.0, passages=RUNNING)
    with unchanged(lm.model):
        for name, edit in zip("abc", edits, strict=True):
            fused.add(name, edit)
        check(fused.edit(), anew(lm, edits, 3.0))
        fused.remove("a")
        check(fused.edit(), anew(lm, edits[1:], 3.0))
        fused.add("a", edits[0])
        check(fused.edit(), anew(lm, edits, 3.0))
    assert fused.edit().origin.requests == tuple(Request(*FACTS[i]) for i in (1, 2, 0))


def test_what_cannot_come_or_go(lm: LM) -> None:
    (edit, *_), sites = edits_of(lm), find_sites(lm.model, last=2)
    fused = FusedEdits(lm, sites[1:], passages=RUNNING)
    with pytest.raises(RequestError, match="not among the matrices"):
        fused.add("a", edit)
    fused = FusedEdits(lm, sites, passages=RUNNING)
    fused.add("a", edit)
    with pytest.raises(RequestError, match="already"):
        fused.add("a", edit)
    with pytest.raises(RequestError, match="no edit named 'b'"):
        fused.remove("b")
    fused.remove("a")
    with pytest.raises(RequestError):
        fused.edit()
