"""MEND's meta-gradient against finite differences, and what following it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from cases import build_lm, records, unchanged
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.low_rank import applied
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_kl, token_nll
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import encode
from emendo.models.trunk import Trunk
from mixtures import build_mixture


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


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_first_token_has_its_share(kind: str) -> None:
    """The untrained editor's edit is a gradient step, less the rest of the row of every text's first token."""
    build = build_lm if kind == "llama" else build_mixture
    lm = build(kind, torch.float64)
    sites = find_sites(lm.model, "all", last=2)
    editor = Mend(sites, MendConfig(alpha=1, norm=False, first_token=0.25), lm.fingerprint).double().eval()
    requests = [Request("Bada", "Oslo"), *(Request(r.prompt, r.target) for r in records(2))]
    with unchanged(lm.model):
        found = editor.each(lm, requests)
    for place, text in enumerate(editor.texts(lm, requests)):
        for site in sites:
            step = gradient_without_rest_of_first_row(lm, site, text, 0.25)
            torch.testing.assert_close(found[site.name][place].dense(), -step, rtol=1e-6, atol=1e-9)


def gradient_without_rest_of_first_row(lm: LM, site: Site, text: Text, share: float) -> Tensor:
    """By hand: ``sum_i delta_i u_i^T`` of one text, with the row of its first token times ``share``."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        routed = getattr(module, "rows", None)
        token = torch.arange(len(args[0].flatten(0, -2))) if routed is None else routed[0]
        seen.append((args[0].detach().flatten(0, -2), output, token))
        return output

    handle = site.module(lm.model).register_forward_hook(keep)
    try:
        logits = lm.model(torch.tensor([text.inputs])).logits[0, text.start - 1 :]
    finally:
        handle.remove()
    total = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
    for u, output, token in seen:
        nll = nn.functional.cross_entropy(logits, torch.tensor(text.labels))
        (gradient,) = torch.autograd.grad(nll, output, retain_graph=True, allow_unused=True)
        weight = torch.where(token == 0, share, 1.0).double()
        if gradient is not None:
            total += (weight[:, None] * gradient.flatten(0, -2)).T @ u
    return total
