"""The model split at its first edited block: resumed passes against full ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from cases import (
    ARCHITECTURES,
    DEPTH,
    VOCABULARY,
    build_model,
    in_slow_suite,
    of_kind,
    plain_logits,
    random_texts,
    unchanged,
)
from emendo.errors import ModelError
from emendo.models.lm import LM
from emendo.models.sites import find_sites, find_stacks
from emendo.models.text import TokenBatch, collate
from emendo.models.trunk import Trunk

Side = Literal["left", "right"]
KINDS = list(ARCHITECTURES)
SIDES: list[tuple[str, Side]] = [(kind, "right") for kind in KINDS] + [
    (kind, "left") for kind in of_kind("causal")
]


def split(model: Any, block: int) -> Trunk:
    """Split below a block of the first stack; below none of them, for edits in the decoder that follows it."""
    if block < DEPTH:
        return Trunk(model, find_sites(model, blocks=[block]))
    return Trunk(model, find_sites(model, "*decoder*", blocks=[2]))


def splits(kind: str) -> range:
    """Where a tiny model can be split."""
    return range(DEPTH + (ARCHITECTURES[kind].kind == "seq2seq"))


def logits(trunk: Trunk, batch: TokenBatch, hidden: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return trunk.logits(batch, hidden)


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_resumed_pass_equals_the_full_one_bit_for_bit(kind: str, side: Side) -> None:
    model = build_model(kind)
    batch = collate(random_texts(kind, 14, 5, 9), side=side)
    with unchanged(model):
        for block in splits(kind):
            trunk = split(model, block)
            hidden = trunk.run(batch)
            assert torch.equal(logits(trunk, batch, hidden), logits(trunk, batch)), f"split at {block}"


@pytest.mark.parametrize("kind", ["llama", *in_slow_suite("gpt2", "t5", "t5-gated", "bart", "bert")])
def test_bit_for_bit_in_bfloat16_too(kind: str) -> None:
    model = build_model(kind, torch.bfloat16)
    batch = collate(random_texts(kind, 14, 5, 9))
    for block in splits(kind):
        trunk = split(model, block)
        hidden = trunk.run(batch)
        assert hidden.dtype == torch.bfloat16
        assert torch.equal(logits(trunk, batch, hidden), logits(trunk, batch)), f"split at {block}"


@pytest.mark.parametrize("kind", KINDS)
def test_run_gives_the_hidden_state_that_enters_the_block(kind: str) -> None:
    model = build_model(kind)
    batch = collate(random_texts(kind, 12, 6))
    reads = model.get_encoder() if batch.source_ids is not None else model
    ids, mask = (
        (batch.input_ids, batch.attention_mask)
        if batch.source_ids is None
        else (batch.source_ids, batch.source_mask)
    )
    with torch.no_grad():
        out = reads(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for block in splits(kind):
        trunk = split(model, block)
        hidden = trunk.run(batch)
        assert trunk.block == block
        assert not hidden.requires_grad
        expected = out.hidden_states[block] if block < DEPTH else out.last_hidden_state
        real = mask.bool()  # what is padded is read by no one
        assert torch.equal(hidden[real], expected[real])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_the_label_positions_are_those_of_the_whole_pass(kind: str) -> None:
    model = build_model(kind)
    batch = collate(random_texts(kind, 12, 6, 8))
    with torch.no_grad():
        expected = plain_logits(model, batch)
    found = logits(split(model, 1), batch)
    assert len(found) == len(batch.labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_padding_and_company_do_not_matter(kind: str, side: Side) -> None:
    model = build_model(kind)
    some = random_texts(kind, 13, 4, 9)
    trunk = split(model, 2)

    def resumed(batch: TokenBatch) -> Tensor:
        return logits(trunk, batch, trunk.run(batch))

    alone = torch.cat([resumed(collate([text])) for text in some])
    torch.testing.assert_close(resumed(collate(some, pad_id=7, side=side)), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_padding_longer_than_a_sliding_window_does_not_matter(kind: str) -> None:
    """Its last rows see no text at all."""
    model = build_model(kind)
    model.set_attn_implementation("eager")
    short, long = random_texts(kind, 4, 30)
    trunk, batch = split(model, 1), collate([short, long])
    alone = logits(trunk, collate([short]))
    for found in (logits(trunk, batch), logits(trunk, batch, trunk.run(batch))):
        torch.testing.assert_close(found[: len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "block", "below", "above"),
    [
        ("llama", 2, [0, 1], [2, 3]),
        ("bert", 3, [0, 1, 2], [3]),
        ("t5", 1, [0], [1, 2, 3, 4, 5, 6, 7]),  # the decoder's are 4 to 7
        ("bart", 2, [0, 1], [2, 3, 4, 5, 6, 7]),
        ("bart", 4, [0, 1, 2, 3], [4, 5, 6, 7]),
    ],
)
def test_only_the_blocks_that_are_needed_run(
    kind: str, block: int, below: list[int], above: list[int]
) -> None:
    model = build_model(kind)
    blocks = [block for stack in find_stacks(model) for block in model.get_submodule(stack.name)]
    ran: list[int] = []
    batch, trunk = collate(random_texts(kind, 8, 5)), split(model, block)
    for i, one in enumerate(blocks):
        one.register_forward_hook(lambda *_, i=i: ran.append(i))
    hidden = trunk.run(batch)
    assert ran == below
    logits(trunk, batch, hidden)  # looks once what a block gives
    ran.clear()
    logits(trunk, batch, hidden)
    assert ran == above


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart", "distilbert"])
def test_kept_in_bfloat16_it_resumes_in_the_dtype_of_the_model(kind: str) -> None:
    model, batch = build_model(kind), collate(random_texts(kind, 8, 5))
    for block in splits(kind)[2:]:
        trunk = split(model, block)
        hidden = trunk.run(batch)
        found = logits(trunk, batch, hidden.bfloat16())
        assert found.dtype == torch.float32
        assert torch.equal(found, logits(trunk, batch, hidden.bfloat16().float()))


def test_the_split_is_below_the_lowest_site(tiny_llama: LM) -> None:
    assert Trunk(tiny_llama.model, find_sites(tiny_llama.model, blocks=[3, 1])).block == 1
    assert Trunk(tiny_llama.model, find_sites(tiny_llama.model)).block == 1


def test_an_encoder_decoder_is_split_in_its_encoder_whatever_is_edited_in_its_decoder() -> None:
    model = build_model("bart")
    assert Trunk(model, find_sites(model)).block == 2
    mixed = (*find_sites(model, "*encoder*", blocks=[3]), *find_sites(model, "*decoder*", blocks=[0]))
    assert Trunk(model, mixed).block == 3
    assert Trunk(model, find_sites(model, "*decoder*")).block == DEPTH
    assert Trunk(model, find_sites(model, "*decoder*")).stack == "model.encoder.layers"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "t5-gated", "bart", "bert"])
def test_nothing_stays_after_an_exception(kind: str) -> None:
    model = build_model(kind)
    batch = collate(random_texts(kind, 8, 5))
    bad = replace(batch, input_ids=batch.input_ids + VOCABULARY)
    if batch.source_ids is not None:
        bad = replace(bad, source_ids=batch.source_ids + VOCABULARY)
    for block in splits(kind)[2:]:
        trunk = split(model, block)
        hidden = trunk.run(batch)
        with unchanged(model):
            with pytest.raises(IndexError):
                trunk.run(bad)
            with pytest.raises(IndexError):
                trunk.logits(bad, hidden)
            with pytest.raises((IndexError, RuntimeError)):
                trunk.logits(replace(batch, positions=batch.positions + 1000), hidden)
        assert torch.equal(logits(trunk, batch, hidden), logits(trunk, batch))


@pytest.mark.parametrize("kind", ["t5", "t5-gated"])
def test_the_bias_that_t5_hands_on_is_lent_and_taken_back(kind: str) -> None:
    """The first block alone owns a table of relative positions; a later one has it for one pass."""
    model = build_model(kind)
    trunk, batch = split(model, 2), collate(random_texts(kind, 9, 4))
    owner, borrower = (model.encoder.block[i].layer[0].SelfAttention for i in (0, 2))
    seen: list[Any] = []

    def look_and_fail(*_: Any) -> None:
        seen.append((borrower.has_relative_attention_bias, borrower.relative_attention_bias))
        raise ZeroDivisionError

    hidden = trunk.run(batch)
    handle = borrower.register_forward_hook(look_and_fail)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        trunk.logits(batch, hidden)
    handle.remove()
    assert seen == [(True, owner.relative_attention_bias)]
    assert not borrower.has_relative_attention_bias
    assert not hasattr(borrower, "relative_attention_bias")
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)
    changed = logits(trunk, batch, hidden)  # and it matters
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)
    assert not torch.allclose(changed, logits(trunk, batch, hidden))


def test_models_that_cannot_be_split_or_scored_are_refused(tiny_llama: LM) -> None:
    headless = AutoModel.from_config(build_model("gpt2").config)
    with pytest.raises(ModelError, match="no vocabulary projection"):
        Trunk(headless, find_sites(headless))
    with pytest.raises(ModelError, match="at least one site"):
        Trunk(tiny_llama.model, ())
    with pytest.raises(ModelError, match=r"no blocks transformer\.h; it has model\.layers"):
        Trunk(tiny_llama.model, find_sites(build_model("gpt2")))
    for kind in ("bart", "t5"):  # an encoder and a decoder under one set of classes
        two = AutoModelForSequenceClassification.from_config(build_model(kind).config)
        with pytest.raises(ModelError, match="one stack of blocks"):
            Trunk(two, find_sites(two))
    first = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("xlnet", vocab_size=VOCABULARY, d_model=32, n_layer=3, n_head=4, d_inner=48)
    )
    with pytest.raises(ModelError, match=r"\[tokens, texts, width\] instead of"):
        Trunk(first.eval(), find_sites(first))


def test_a_model_that_cannot_resume_runs_in_full() -> None:
    """XLM keeps its attention and its MLPs in two lists; a trunk would skip the one and run the other."""
    sizes = {"n_words": VOCABULARY, "vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 4, "n_heads": 4}
    config = AutoConfig.for_model("xlm", **sizes, init_std=0.2, pad_index=1, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    batch = collate(random_texts("llama", 9, 6))
    trunk = Trunk(model, find_sites(model))
    with unchanged(model):
        hidden = trunk.run(batch)
        found = logits(trunk, batch, hidden)
    assert hidden.shape == (2, 8, 1)
    assert trunk.packing(batch).modules == {}
    assert torch.equal(found, logits(trunk, batch))


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "t5", "llama"])
def test_a_deep_trunk_is_resumed_from(kind: str) -> None:
    """Stand-ins give what the blocks give: GPT-Neo's a tuple, of which a tensor would lose one dimension a block."""
    deep = {"t5": {"num_layers": 8}, "gpt2": {"n_layer": 8}, "llama": {"num_hidden_layers": 8}}.get(
        kind, {"num_layers": 8, "attention_types": [[["global", "local"], 4]]}
    )
    model = build_model(kind, **deep)
    batch = collate(random_texts(kind, 14, 5, 9))
    trunk = Trunk(model, find_sites(model, blocks=[6]))
    assert trunk.block == 6
    with unchanged(model):
        assert torch.equal(logits(trunk, batch, trunk.run(batch)), logits(trunk, batch))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_projection_that_is_trained_is_left_to_autograd(kind: str) -> None:
    trunk = split(build_model(kind), 1)
    assert trunk.projection is trunk.model.get_output_embeddings()
    trunk.projection.requires_grad_(True)
    assert split(trunk.model, 1).projection is None
