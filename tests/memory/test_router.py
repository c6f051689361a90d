"""The judge and the key encoder against float64 and slow references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cases import build_lm
from emendo.memory.encoder import KeyEncoder, hidden_states
from emendo.memory.router import Judge, Router, index_of
from emendo.memory.words import EVIDENCE, Prompt
from emendo.models.lm import LM

PROMPTS = ["The capital of Fosoba is", "A", "The river in Dorumi is called the", "Oslo"]


def a_judge(numbers: int, hidden: int = 5) -> Judge:
    random = np.random.default_rng(0)
    shapes = ((hidden, numbers), (hidden,), (hidden,), (1,))
    parts = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    return Judge(*parts, np.linspace(0, 0.99, 100, dtype=np.float32))


def test_a_score_is_the_function_of_the_docstring() -> None:
    judge, x = a_judge(4), torch.rand(7, 4, dtype=torch.float64)
    w1, b1, w2, b2 = (torch.from_numpy(getattr(judge, name)).double() for name in ("w1", "b1", "w2", "b2"))
    want = torch.sigmoid(torch.tanh(x @ w1.T + b1) @ w2 + b2)
    assert np.allclose(judge(x.float().numpy()), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.02, 0.25, 1.0])
def test_the_share_of_false_fires_is_the_one_that_was_asked_for(rate: float) -> None:
    judge = a_judge(4)
    assert (judge.scores >= judge.threshold(rate)).mean() == pytest.approx(rate)


def test_hidden_states_are_those_of_the_model() -> None:
    lm = build_lm("llama")  # transformers leaves hooks behind
    found = {}
    for part, hidden, mask in hidden_states(lm, PROMPTS, 1):
        found |= {place: row[own] for place, row, own in zip(part, hidden, mask, strict=True)}
    for place, text in enumerate(lm.prompt_texts(PROMPTS)):
        ids = torch.tensor([text.inputs])
        want = lm.model(ids, output_hidden_states=True).hidden_states[1][0]
        assert torch.allclose(found[place], want, atol=1e-5)


def test_a_key_is_attention_pooling_of_a_prompts_own_tokens() -> None:
    lm = build_lm("llama")
    encoder = KeyEncoder(lm.model.config.hidden_size, 1, size=8, heads=2)
    encoder.mean.normal_()
    keys = encoder.keys(lm, PROMPTS)
    assert torch.allclose(keys.norm(dim=-1), torch.ones(len(PROMPTS), 2), atol=1e-5)
    for place, text in enumerate(lm.prompt_texts(PROMPTS)):
        hidden = lm.model(torch.tensor([text.inputs]), output_hidden_states=True).hidden_states[1][0]
        rows = (hidden[1:] if len(hidden) > 1 else hidden) - encoder.mean
        for number, part in enumerate(encoder.parts):
            weight, value = part.query(rows).softmax(0), part.value(rows)
            heads = [weight[:, head] @ value[:, 4 * head : 4 * head + 4] for head in range(2)]
            pooled = torch.cat(heads)
            want = normalize(part.line(pooled) + part.curve(pooled), dim=-1)
            assert torch.allclose(keys[place, number], want, atol=1e-5)


def test_a_router_is_the_same_after_it_was_stored(tiny_llama: LM, tmp_path: Path) -> None:
    encoder = KeyEncoder(tiny_llama.model.config.hidden_size, 1, size=8, heads=2).requires_grad_(False)
    router = Router(a_judge(len(EVIDENCE) + 2), encoder, tiny_llama.fingerprint, {"steps": 3})
    router.save_pretrained(tmp_path / "router")
    again = Router.from_pretrained(tmp_path / "router")
    assert (again.fingerprint, again.info) == (router.fingerprint, router.info)
    for one in (router, again):
        index = index_of(one, tiny_llama, [Prompt.read(text) for text in PROMPTS])
        found = [one.scores(query, index) for query in one.read(tiny_llama, PROMPTS[::-1])]
        if one is router:
            want = found
    assert found == want


def test_the_wording_of_an_edit_is_in_its_scope_whatever_the_judge_says(tiny_llama: LM) -> None:
    judge = a_judge(len(EVIDENCE))
    judge.w2[:], judge.b2[:] = 0, -40
    router = Router(judge)
    index = index_of(router, tiny_llama, [Prompt.read(PROMPTS[0]), Prompt.read(f"{PROMPTS[0]} not")])
    (query,) = router.read(tiny_llama, [f"{PROMPTS[0]}  "])
    assert router.scores(query, index) == pytest.approx({0: 1, 1: 0}, abs=1e-9)


def test_the_lexical_router_serves_other_models() -> None:
    lm = build_lm("gpt2")
    router = Router.shipped_for(lm)
    assert router.encoder is None
    assert router.judge.w1.shape[1] == len(EVIDENCE)
