"""Joint ROME: the rows against dense solves, the values against Adam through the whole model, and earlier edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from cases import build_lm, plain_logits, records, unchanged
from emendo.editors.joint_rome import JointRome, JointRomeConfig, JointSearch
from emendo.edits.edit import Request
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts

FAST: dict[str, Any] = {"contexts": 2, "per_step": 2, "stay": 30, "running": 2, "passages": 2, "until": 1e-9}


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request(record.prompt, record.target) for record in records(first + count)[first:]]


def editor_for(lm: LM, **settings: Any) -> JointRome:
    return JointRome(find_sites(lm.model, last=2), JointRomeConfig(**{**FAST, **settings}))


def test_each_row_answers_its_own_key_and_little_else() -> None:
    """Without overlap, ``Q K^T = I`` with the least answer to what must stay; else the dense formula."""
    lm = build_lm("llama", torch.float64)
    editor = editor_for(lm, overlap=1e-12)
    search = JointSearch(editor, lm, requests(3))
    torch.manual_seed(0)
    for name, keys in search.keys.items():
        Q = search.right[name]
        torch.testing.assert_close(Q @ keys.mT, torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        C = moment_of(editor, lm, name, requests(3))
        for _ in range(10):  # any other rows with the same answers to the keys answer the rest more
            step = torch.randn(Q.shape, dtype=torch.float64)
            other = Q + 0.1 * (step - step @ keys.mT @ torch.linalg.pinv(keys.mT))
            assert (Q @ C @ Q.mT).trace() < (other @ C @ other.mT).trace()
    search = JointSearch(editor_for(lm, overlap=0.5), lm, requests(3))
    for name, keys in search.keys.items():
        X = keys @ torch.linalg.inv(moment_of(editor, lm, name, requests(3)))
        inner = X @ keys.mT
        inner = inner + 0.5 * inner.trace() / 3 * torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(search.right[name], torch.linalg.inv(inner) @ X, rtol=1e-6, atol=1e-9)


def moment_of(editor: JointRome, lm: LM, name: str, facts: list[Request]) -> Tensor:
    """``C`` of a matrix, with the inputs of the prompts with other names read one by one through the whole model."""
    seen: list[Tensor] = []
    module = lm.model.get_submodule(name)
    with module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0])):
        for fact in facts:
            for text in editor.surrounded(lm, fact).near:
                lm.model(torch.tensor([text.inputs]))
    rows = torch.cat(seen).detach()
    return editor.moments(lm)[name] + 10 * rows.mT @ rows / len(rows)


def test_the_values_move_as_autograd_says() -> None:
    """The reference reads every text by itself, through the whole model, with logits and no trunk."""
    lm = build_lm("llama", torch.float64)
    editor = editor_for(lm, epochs=3, lr=0.05)
    with unchanged(lm.model):
        found = editor.together(lm, requests(2))
    search = JointSearch(editor, lm, requests(2))
    running = search.passages
    values = {name: torch.zeros_like(change.left).requires_grad_() for name, change in found.items()}
    adam = torch.optim.Adam(values.values(), 0.05 * search.unit, eps=1e-12)
    for _ in range(3):
        changes = {name: LowRank(value, found[name].right) for name, value in values.items()}
        stay = [text for own in search.stay for text in own] + list(running)
        with applied(lm.model, changes):
            loss = sum(
                nll(lm, texts[0]) + sum(nll(lm, text) for text in texts[1:]) / 2 for texts in search.taught
            )
            after = [plain_logits(lm.model, collate([text])).log_softmax(-1) for text in stay]
        before = [plain_logits(lm.model, collate([text])).log_softmax(-1) for text in stay]
        kl = sum(
            kl_div(q, p, log_target=True, reduction="batchmean") for p, q in zip(before, after, strict=True)
        )
        adam.zero_grad()
        (loss + editor.config.c_kl * 2 / len(stay) * kl).backward()
        adam.step()
    for name, change in found.items():
        assert change.rank == 2
        assert values[name].abs().max() > 0
        torch.testing.assert_close(change.left, values[name].detach(), rtol=1e-3, atol=1e-7)


def nll(lm: LM, text: Text) -> Tensor:
    return cross_entropy(plain_logits(lm.model, collate([text])), torch.tensor(text.labels))


def test_a_step_moves_the_values_of_its_own_facts(tiny_llama: LM) -> None:
    search = JointSearch(editor_for(tiny_llama, stay=2), tiny_llama, requests(4))
    before = {name: value.clone() for name, value in search.parameters.items()}
    assert search.step([1, 3], 0) == set()
    for name, value in search.parameters.items():
        moved = (value != before[name]).any(0)
        assert moved.tolist() == [False, True, False, True]
    assert search.steps_of.tolist() == [0, 1, 0, 1]


def test_facts_that_are_learnt_rest_and_the_search_ends(tiny_llama: LM) -> None:
    editor = editor_for(tiny_llama, until=100.0, epochs=5)
    change = editor.together(tiny_llama, requests(3))
    assert all(not own.left.any() for own in change.values())  # every NLL is below 100 from the start


def test_all_facts_become_likelier_in_one_change(tiny_llama: LM) -> None:
    facts = requests(6)
    editor = editor_for(tiny_llama, stay=2, epochs=6, lr=0.1, c_kl=1.0, batch=3)
    texts = to_texts(tiny_llama, [fact.pair for fact in facts])
    before = torch.stack([nll(tiny_llama, text) for text in texts]).detach()
    with editor.edit(tiny_llama, facts).applied(tiny_llama) as lm:
        after = torch.stack([nll(lm, text) for text in texts]).detach()
    assert (after < 0.8 * before).all()


@pytest.mark.parametrize("times", [1, 2])
def test_the_keys_of_earlier_edits_are_answered_less(tiny_llama: LM, times: int) -> None:
    editor = editor_for(tiny_llama, stay=2)
    first, second = requests(3), requests(3, first=3)
    keys = JointSearch(editor, tiny_llama, first).keys
    plain = JointSearch(editor, tiny_llama, second).right
    for _ in range(times):
        editor.continue_from(tiny_llama, first)
    spared = JointSearch(editor, tiny_llama, second).right
    for name, own in keys.items():
        assert (spared[name] @ own.mT).norm() < (plain[name] @ own.mT).norm()
        sums, count = editor.earlier[name]
        torch.testing.assert_close(sums, times * own.mT @ own, rtol=1e-3, atol=1e-5)
        assert count == 3 * times
    editor.start_over()
    for name, right in JointSearch(editor, tiny_llama, second).right.items():
        assert torch.equal(right, plain[name])
