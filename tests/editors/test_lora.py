"""LoRA: the change of the factors against autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from cases import build_lm, in_slow_suite, plain_logits, records_for, unchanged
from emendo.editors.lora import Lora, LoraConfig
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts


def facts_of(lm: LM, n: int) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records_for(lm, n)]


def lora(lm: LM, **config: float) -> Lora:
    return Lora(find_sites(lm.model), LoraConfig(**{"rank": 3, "steps": 4, "lr": 1e-3, **config}))


def start(lm: LM) -> dict[str, LowRank]:
    """`B` and `A` before the first step: what a learning rate near 0 leaves of them."""
    return dict(lora(lm, steps=1, lr=1e-300).edit(lm, facts_of(lm, 1)).deltas)


def trained(lm: LM, texts: list[Text], steps: int, lr: float) -> dict[str, LowRank]:
    """The reference: both factors are leaves of autograd, beside the model in every pass."""
    changes = {
        name: LowRank(torch.zeros_like(c.left).requires_grad_(), c.right.clone().requires_grad_())
        for name, c in start(lm).items()
    }
    optimizer = torch.optim.Adam([t for c in changes.values() for t in (c.left, c.right)], lr)
    for _ in range(steps):
        with applied(lm.model, changes):
            logits = [plain_logits(lm.model, collate([text])) for text in texts]
        losses = [cross_entropy(z, torch.tensor(text.labels)) for z, text in zip(logits, texts, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return {name: LowRank(c.left.detach(), c.right.detach()) for name, c in changes.items()}


@pytest.mark.parametrize("kind", ["gpt2", *in_slow_suite("bart", "bert")])
def test_both_factors_move_as_autograd_says(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    facts = [fact for fact in facts_of(lm, 9) if not said(lm, fact)][:2]
    texts = to_texts(lm, [(fact.prompt, fact.target) for fact in facts])
    with unchanged(lm.model):
        each, together = lora(lm).each(lm, facts), lora(lm).together(lm, facts)
    references = [*(trained(lm, [text], 4, 1e-3) for text in texts), trained(lm, texts, 4, 1e-3)]
    found = [*({name: change[i] for name, change in each.items()} for i in range(2)), together]
    for one, reference in zip(found, references, strict=True):
        for name, change in one.items():
            assert change.rank == 3
            torch.testing.assert_close(change.left, reference[name].left, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(change.right, reference[name].right, rtol=1e-5, atol=1e-9)


def said(lm: LM, fact: Request) -> bool:
    (text,) = to_texts(lm, [(fact.prompt, fact.target)])
    return plain_logits(lm.model, collate([text])).argmax(-1).tolist() == list(text.labels)


def test_it_starts_as_in_peft_and_stops_at_the_target(tiny_llama: LM) -> None:
    for site in find_sites(tiny_llama.model):
        change = start(tiny_llama)[site.name]
        edge = site.d_in**-0.5
        assert change.left.abs().max() == 0
        assert 0.8 * edge < change.right.abs().max() <= edge
        assert float(change.right.std()) == pytest.approx(edge / 3**0.5, rel=0.3)
    fact = facts_of(tiny_llama, 1)[0]
    edit = lora(tiny_llama, steps=50, lr=1e-2).edit(tiny_llama, fact.prompt, fact.target)
    assert not said(tiny_llama, fact)
    with edit.applied(tiny_llama):
        assert said(tiny_llama, fact)


def test_the_seed_chooses_the_start(tiny_llama: LM) -> None:
    facts = facts_of(tiny_llama, 2)

    def left(seed: int) -> torch.Tensor:
        return next(iter(lora(tiny_llama, seed=seed).each(tiny_llama, facts).values())).left

    assert torch.equal(left(0), left(0))
    assert not torch.equal(left(0), left(1))


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="rank must be at least 1, not 0"):
        LoraConfig(rank=0)
