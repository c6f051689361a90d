"""MEND's meta-gradient against finite differences, and what following it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from cases import build_lm, records, unchanged
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.low_rank import applied
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_kl, token_nll
from emendo.models.sites import find_sites
from emendo.models.text import collate
from emendo.models.tokenization import encode
from emendo.models.trunk import Trunk


def outer_loss(lm: LM, editor: Mend, factors: Mapping[str, Factors]) -> Callable[[], Tensor]:
    """NLL of the target on a paraphrase plus KL on a neighbour, each example under its own edit."""
    facts = records(2)
    judged = [(r.paraphrases[0], r.target) for r in facts] + [
        (r.neighbours[0].prompt, r.neighbours[0].answer) for r in facts
    ]
    batch, trunk = collate(encode(lm.tokenizer, judged)), Trunk(lm.model, editor.sites)
    hidden = trunk.run(batch)
    rows = torch.tensor([0, 1, 0, 1])

    def logits() -> Tensor:
        return trunk.logits(batch, hidden)

    clean, edited = logits(), batch.owner < 2

    def loss() -> Tensor:
        deltas = {name: delta[rows] for name, delta in editor(factors).items()}
        with applied(lm.model, deltas):
            found = logits()
        nll = token_nll(found, batch.labels)
        values = torch.where(edited, nll, token_kl(clean, found))
        return per_example(values, batch.owner, 4).sum()

    return loss


@pytest.mark.parametrize(
    "config",
    [
        MendConfig(rank=3),
        MendConfig(rank=3, shared=False, identity=False),
        MendConfig(rank=3, factors="smaller"),
        MendConfig(rank=3, norm=False),
    ],
    ids=["mend", "unshared, no identity", "smaller", "no normalisation"],
)
def test_meta_gradient_equals_finite_differences(config: MendConfig) -> None:
    """Through the editor, the application of the edit and both outer losses, in float64."""
    lm = build_lm("gpt2", torch.float64)
    sites = find_sites(lm.model, last=2)
    facts = encode(lm.tokenizer, [(r.prompt, r.target) for r in records(2)])
    with unchanged(lm.model):
        factors = edit_factors(Trunk(lm.model, sites), sites, facts)
        editor = Mend(sites, config).double()
        editor.train()(factors)
        for name, parameter in editor.named_parameters():
            nn.init.normal_(
                parameter, mean=0.01 if name == "alpha" else 0.0, std=0.003 if name == "alpha" else 0.2
            )
        loss = outer_loss(lm, editor.eval(), factors)
        names, parameters = zip(*editor.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss(), parameters)
        assert loss() > 1
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            noise = torch.randn_like(parameter)
            step = 1e-6 * (noise / noise.norm() + gradient / gradient.norm())
            with torch.no_grad():
                parameter += step
                above = loss()
                parameter -= 2 * step
                below = loss()
                parameter += step
            expected = (gradient * step).sum()
            assert gradient.any(), name
            difference = (above - below) / 2
            assert abs(difference - expected) <= 1e-4 * gradient.norm() * step.norm() + 1e-14, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_learns_to_edit(kind: str) -> None:
    """A few steps on a few facts: the outer loss falls well below that of the plain step it starts from."""
    lm = build_lm(kind)
    sites = find_sites(lm.model, last=2)
    facts = encode(lm.tokenizer, [(r.prompt, r.target) for r in records(2)])
    factors = edit_factors(Trunk(lm.model, sites), sites, facts)
    editor = Mend(sites, MendConfig(rank=16, alpha=1e-3))
    loss = outer_loss(lm, editor, factors)
    optimiser = torch.optim.Adam(editor.parameter_groups(3e-3))
    with unchanged(lm.model):
        start = float(loss().detach())
        for _ in range(40):
            optimiser.zero_grad()
            value = loss()
            value.backward()
            optimiser.step()
    assert float(value.detach()) < 0.5 * start
