"""The model split at its first edited block: resumed passes against full ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from cases import ARCHITECTURES, DEPTH, VOCABULARY, build_model, unchanged
from emendo.errors import ModelError
from emendo.models import LM
from emendo.sites import find_sites
from emendo.texts import Text, TokenBatch, collate
from emendo.trunk import Trunk

KINDS = sorted(ARCHITECTURES)
Side = Literal["left", "right"]


def texts(*lengths: int) -> list[Text]:
    """Random texts of so many tokens; the last three are the answer."""
    return [Text(tuple(torch.randint(2, VOCABULARY, (n,)).tolist()), n - 3) for n in lengths]


def split(model: Any, block: int) -> Trunk:
    return Trunk(model, find_sites(model, blocks=[block]))


def logits(trunk: Trunk, batch: TokenBatch, hidden: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return trunk.logits(batch, hidden)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_pass_equals_the_full_one_bit_for_bit(kind: str, side: Side) -> None:
    model = build_model(kind)
    batch = collate(texts(14, 5, 9), side=side)
    with unchanged(model):
        for block in range(DEPTH):
            trunk = split(model, block)
            hidden = trunk.run(batch)
            assert torch.equal(logits(trunk, batch, hidden), logits(trunk, batch)), f"split at {block}"


@pytest.mark.parametrize("kind", KINDS)
def test_run_gives_the_hidden_state_that_enters_the_block(kind: str) -> None:
    model = build_model(kind)
    batch = collate(texts(12, 6))
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        expected = model(**inputs, output_hidden_states=True).hidden_states
    for block in range(DEPTH):
        hidden = split(model, block).run(batch)
        assert not hidden.requires_grad
        assert torch.equal(hidden, expected[block])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_the_label_positions_are_those_of_the_whole_pass(kind: str) -> None:
    model = build_model(kind)
    batch = collate(texts(12, 6, 8))
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    found = logits(split(model, 1), batch)
    assert found.shape == (9, VOCABULARY)
    torch.testing.assert_close(found, whole.flatten(0, 1)[batch.positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_company_do_not_matter(kind: str) -> None:
    model = build_model(kind)
    some = texts(13, 4, 9)
    trunk = split(model, 2)

    def resumed(batch: TokenBatch) -> Tensor:
        return logits(trunk, batch, trunk.run(batch))

    alone = torch.cat([resumed(collate([text])) for text in some])
    for side in ("left", "right"):
        torch.testing.assert_close(resumed(collate(some, pad_id=7, side=side)), alone, rtol=1e-4, atol=1e-4)


def test_only_the_blocks_that_are_needed_run(tiny_llama: LM) -> None:
    model: Any = tiny_llama.model
    ran: list[int] = []
    batch, trunk = collate(texts(8, 5)), split(model, 2)
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(model.model.layers)
    ]
    try:
        hidden = trunk.run(batch)
        assert ran == [0, 1]
        ran.clear()
        logits(trunk, batch, hidden)
        assert ran == [2, 3]
    finally:
        for handle in handles:
            handle.remove()


def test_kept_in_bfloat16_it_resumes_in_the_dtype_of_the_model(tiny_gpt2: LM) -> None:
    batch, trunk = collate(texts(8, 5)), split(tiny_gpt2.model, 2)
    hidden = trunk.run(batch)
    found = logits(trunk, batch, hidden.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, logits(trunk, batch, hidden.bfloat16().float()))


def test_the_split_is_below_the_lowest_site(tiny_llama: LM) -> None:
    assert Trunk(tiny_llama.model, find_sites(tiny_llama.model, blocks=[3, 1])).block == 1
    assert Trunk(tiny_llama.model, find_sites(tiny_llama.model)).block == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_stays_after_an_exception(kind: str) -> None:
    model = build_model(kind)
    batch, trunk = collate(texts(8, 5)), split(model, 2)
    hidden = trunk.run(batch)
    bad = replace(batch, input_ids=batch.input_ids + VOCABULARY)
    with unchanged(model):
        with pytest.raises(IndexError):
            trunk.run(bad)
        with pytest.raises(IndexError):
            trunk.logits(bad, hidden)
        with pytest.raises((IndexError, RuntimeError)):
            trunk.logits(replace(batch, positions=batch.positions + 1000), hidden)


def test_models_that_cannot_be_split_or_scored_are_refused() -> None:
    headless = AutoModel.from_config(build_model("gpt2").config)
    with pytest.raises(ModelError, match="no vocabulary projection"):
        Trunk(headless, find_sites(headless))
