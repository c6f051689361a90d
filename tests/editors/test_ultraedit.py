"""UltraEdit against its equations in float64 on rows of whole passes, and its statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cases import build_lm, plain_logits, records, unchanged
from emendo.editors import Editor
from emendo.editors._answer_rows import Statistics
from emendo.editors.ultraedit import UltraEdit, UltraEditConfig
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import collate
from emendo.models.tokenization import to_texts


def requests(count: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records(count)]


def rows(lm: LM, site: Site, facts: list[Request]) -> tuple[Tensor, Tensor]:
    """Inputs and gradients at the answers, each fact by itself through the whole model."""
    found: list[tuple[Tensor, Tensor]] = []
    for text in to_texts(lm, [(fact.prompt, fact.target) for fact in facts]):
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(module, args, output, seen=seen):  # type: ignore[no-untyped-def]
            seen.append((args[0], output.detach().requires_grad_()))
            return seen[-1][1]

        with site.module(lm.model).register_forward_hook(hook):
            logits = plain_logits(lm.model, collate([text]))
        ((h, output),) = seen
        (g,) = torch.autograd.grad(cross_entropy(logits, torch.tensor(text.labels)), output)
        at = slice(text.start - 1, None)
        found.append((h[0, at].detach(), g[0, at]))
    return torch.cat([h for h, _ in found]), torch.cat([g for _, g in found])


def normalised(x: Tensor, seen: Tensor) -> Tensor:
    return (x - seen.mean(0)) / seen.std(0)


def equation(h: Tensor, g: Tensor, all_h: Tensor, all_g: Tensor, config: UltraEditConfig) -> Tensor:
    """The published form, with the statistics of some rows."""
    size = normalised(h, all_h).square().sum(1, keepdim=True)
    if config.whiten:
        values, vectors = torch.linalg.eigh(torch.cov(all_g.T))
        kept = values > 1e-9 * values.max()
        g_hat = (g - all_g.mean(0)) @ (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T
    else:
        g_hat = normalised(g, all_g)
    V = -config.eta * size * g_hat
    return V.mT @ h @ torch.linalg.inv(h.mT @ h + config.ridge * torch.eye(h.shape[1], dtype=h.dtype))


@pytest.mark.parametrize("whiten", [False, True])
def test_a_turn_is_the_published_equation_and_turns_build_upon_one_another(whiten: bool) -> None:
    lm = build_lm("llama", torch.float64)
    (site,) = sites = find_sites(lm.model, "*down_proj", last=1)
    config = UltraEditConfig(eta=1e-3, ridge=0.5, turn=4, whiten=whiten)
    facts = requests(8)
    with unchanged(lm.model):
        found = UltraEdit(sites, config).together(lm, facts)[site.name].dense()
    h, g = rows(lm, site, facts[:4])
    first = equation(h, g, h, g, config)
    with applied(lm.model, {site.name: LowRank.from_dense(first)}):
        later_h, later_g = rows(lm, site, facts[4:])
    second = equation(later_h, later_g, torch.cat([h, later_h]), torch.cat([g, later_g]), config)
    torch.testing.assert_close(found, first + second, rtol=1e-3, atol=1e-6)


def test_statistics_of_earlier_edits_count_and_are_saved(tmp_path: Path) -> None:
    lm = build_lm("llama", torch.float64)
    sites, facts = find_sites(lm.model, last=1), requests(6)
    config = UltraEditConfig(eta=1e-3, whiten=True)
    editor = UltraEdit(sites, config)
    alone = editor.together(lm, facts[3:])
    editor.together(lm, facts[:3])
    editor.continue_from(lm, facts[:3])
    editor.save_pretrained(tmp_path / "editor")
    later = editor.together(lm, facts[3:])
    again = Editor.from_pretrained(tmp_path / "editor").together(lm, facts[3:])
    for name, change in later.items():
        torch.testing.assert_close(again[name].dense(), change.dense())
        assert not torch.allclose(change.dense(), alone[name].dense())
    with pytest.raises(RequestError, match="last edit"):
        editor.continue_from(lm, facts[:1])
    editor.start_over()
    for name, change in editor.together(lm, facts[3:]).items():
        torch.testing.assert_close(change.dense(), alone[name].dense())


def test_rounds_lower_the_loss_and_stop_at_what_is_learnt() -> None:
    lm = build_lm("llama")
    sites, facts = find_sites(lm.model, last=2), requests(3)

    def loss(changes: dict[str, LowRank]) -> float:
        with applied(lm.model, changes):
            texts = to_texts(lm, [(fact.prompt, fact.target) for fact in facts])
            each = [
                cross_entropy(plain_logits(lm.model, collate([text])), torch.tensor(text.labels))
                for text in texts
            ]
        return float(torch.stack(each).mean())

    losses = [
        loss(UltraEdit(sites, UltraEditConfig(eta=3e-4, rounds=rounds)).together(lm, facts))
        for rounds in (1, 3)
    ]
    assert losses[1] < losses[0] < loss({})


def test_a_first_row_stands_as_it_is_and_the_deviation_is_exact() -> None:
    """The published normaliser gives NaN for one row, and is off by 12% for batches of four."""
    torch.manual_seed(0)
    one = Statistics((5, 3), whiten=True)
    h, g = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    one.update(h, g)
    torch.testing.assert_close(one.values(h, g), -(h @ h.mT) * g)  # nothing to compare it with
    many, x = Statistics((5, 3), whiten=False), torch.randn(40, 5, dtype=torch.float64)
    y = torch.randn(40, 3, dtype=torch.float64)
    for at in range(0, 40, 4):
        many.update(x[at : at + 4], y[at : at + 4])
    torch.testing.assert_close(many.h.std(), x.std(0))
