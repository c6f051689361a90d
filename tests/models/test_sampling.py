"""Text sampled from the model: the right distribution, reproducible, cached, and used by training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cases import build_lm, records, unchanged
from emendo.editors.mend import Mend, MendConfig
from emendo.errors import TrainingError
from emendo.models import _sampling as writing
from emendo.models._sampling import PASSAGES_PER_BATCH, own_passages, sample_tokens
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.train import TrainConfig, loop, train


@pytest.fixture(scope="module")
def lm() -> LM:
    return build_lm("llama")


@pytest.mark.slow
def test_samples_follow_the_full_distribution_whatever_the_generation_config() -> None:
    lm = build_lm("llama")
    lm.model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=3, top_p=0.2, repetition_penalty=9.0
    )
    with torch.no_grad():
        lm.model.model.norm.weight.mul_(4)  # from nearly uniform to a few likely tokens
    prompt = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        expected = lm.model(prompt).logits[0, -1].softmax(-1)
    rows = 20_000
    many = prompt.expand(rows, -1)
    torch.manual_seed(0)
    found = sample_tokens(lm, {"input_ids": many, "attention_mask": torch.ones_like(many)}, 1)
    assert found.shape == (rows, 1)
    seen = found.flatten().bincount(minlength=len(expected)) / rows
    assert expected.max() < 0.9 and (expected > 0.01).sum() > 5
    spread = (expected * (1 - expected) / rows).sqrt()
    assert ((seen - expected).abs() <= 5 * spread + 1e-3).all()


def test_passages_do_not_depend_on_how_many_are_requested(lm: LM, tmp_path: Path) -> None:
    with unchanged(lm.model):
        before = torch.random.get_rng_state()
        many = own_passages(lm, PASSAGES_PER_BATCH + 3)
        assert torch.random.get_rng_state().equal(before)
    assert len(many) == PASSAGES_PER_BATCH + 3
    assert len(set(many)) > PASSAGES_PER_BATCH
    assert own_passages(lm, 2) == many[:2]
    assert not any(token in text for text in many for token in lm.tokenizer.all_special_tokens)


def test_passages_are_cached(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = own_passages(lm, 3, tmp_path)
    more = own_passages(lm, PASSAGES_PER_BATCH + 1, tmp_path)
    assert more[:3] == first
    other = own_passages(build_lm("llama", seed=1), 3, tmp_path)
    assert other != first
    monkeypatch.setattr(writing, "_write_passages", None)
    assert own_passages(lm, PASSAGES_PER_BATCH + 1, tmp_path) == more


def test_a_short_context_is_respected() -> None:
    short = build_lm("gpt2", n_positions=12)
    assert short.context == 12
    lengths = [len(short.tokenizer(text)["input_ids"]) for text in own_passages(short, 5)]
    assert min(lengths) > 0


def test_a_tokenizer_without_begin_and_end_token_is_refused() -> None:
    lm = build_lm("llama")
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    with pytest.raises(TrainingError, match="--text FILE"):
        own_passages(lm, 1)


@pytest.mark.parametrize(
    ("kind", "given", "text", "written"),
    [
        ("llama", (), 1, 2),
        ("llama", (), 2, 4),
        ("llama", (), 0, 0),
        ("llama", ("one two three four five six",), 1, 0),
        ("bart", (), 1, 0),
        ("bert", (), 1, 0),
    ],
)
def test_only_a_decoder_without_given_text_samples_its_own(
    kind: str, given: tuple[str, ...], text: int, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def note(lm: LM, count: int, folder: Path | None) -> list[str]:
        requests.append((count, folder))
        return own_passages(lm, count, folder)

    monkeypatch.setattr(loop, "own_passages", note)
    lm = build_lm(kind)
    facts = records(8, answers=lm.labels) if kind == "bert" else records(8)
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=4))
    train(lm, editor, facts, (), TrainConfig(steps=1, batch=2, warmup=0, text=text), passages=given)
    assert requests == ([(written, None)] if written else [])
