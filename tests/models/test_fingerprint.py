"""The short name of a model's weights."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from cases import build_model
from emendo.low_rank import LowRank, applied
from emendo.models._fingerprint import fingerprint
from emendo.models.lm import LM
from emendo.models.sites import find_sites


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_same_weights_same_name(kind: str) -> None:
    name = fingerprint(build_model(kind))
    assert re.fullmatch("[0-9a-f]{16}", name)
    assert fingerprint(build_model(kind)) == name
    assert fingerprint(build_model(kind).to(torch.bfloat16)) == name
    assert fingerprint(build_model(kind, torch.bfloat16).float()) == name
    assert fingerprint(build_model(kind).train()) == name


def test_other_weights_other_name() -> None:
    names = {
        fingerprint(build_model(kind, seed=seed)) for kind in ("llama", "gpt2", "mistral") for seed in (0, 1)
    }
    assert len(names) == 6


def test_names_and_shapes_count() -> None:
    a, b = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    nn.init.ones_(a.weight)
    nn.init.ones_(b.weight)
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(nn.ModuleDict({"x": a})) != fingerprint(nn.ModuleDict({"y": a}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_edit_changes_it_and_an_attached_one_does_not(kind: str) -> None:
    model = build_model(kind)
    site = find_sites(model, last=1)[0]
    weight = site.weight(model)
    left, right = torch.randn(site.d_out, 1), torch.randn(1, site.d_in)
    size = 0.01 * weight.norm() / LowRank(left, right).norm()  # ||dW|| / ||W|| = 1%
    deltas = {site.name: LowRank(left * size, right)}
    before = fingerprint(model)
    with applied(model, deltas):
        assert fingerprint(model) == before
    merged = copy.deepcopy(model)
    site.weight(merged).add_(deltas[site.name].dense())
    assert fingerprint(merged) != before
    assert fingerprint(model) == before


def test_a_language_model_knows_its_own(tiny_llama: LM) -> None:
    assert tiny_llama.fingerprint == fingerprint(tiny_llama.model)
