"""The answers of a language model, against one slow pass for each token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from cases import (
    ARCHITECTURES,
    CLASSES,
    CONTEXT,
    build_lm,
    of_kind,
    plain_logits,
    records_for,
    unchanged,
)
from emendo.errors import ModelError, RequestError
from emendo.models._forward import contiguous_projection
from emendo.models.lm import LM
from emendo.models.text import collate
from emendo.models.tokenization import to_texts

SAMPLE = ["llama", "gpt2", "t5", "t5-gated", "bart", "bert", "roberta", "distilbert"]
PROMPTS = ["The capital of Bababa is", "A", "Water is made of hydrogen and "]


@torch.no_grad()
def first_logits(lm: LM, prompt: str, said: tuple[int, ...] = ()) -> Tensor:
    """The slow reference: the logits of the token after the prompt and the tokens said so far, `[vocabulary]`."""
    own = prompt.removesuffix(" ") if lm.kind == "causal" else prompt  # the space is part of the answer
    ids = lm.tokenizer(own, return_tensors="pt").input_ids
    if lm.kind == "causal":
        ids = torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)
        return lm.model(ids).logits[0, -1]  # type: ignore[no-any-return]
    if lm.kind == "classifier":
        return lm.model(ids).logits[0]  # type: ignore[no-any-return]
    start = (
        (2, 0) if "bart" in lm.name else (0,)
    )  # BART's decoder begins with </s> <s>, T5's with its padding
    return lm.model(ids, decoder_input_ids=torch.tensor([[*start, *said]])).logits[0, -1]  # type: ignore[no-any-return]


def greedy(lm: LM, prompt: str, n: int) -> str:
    """The slow reference: one full pass for each token."""
    if lm.kind == "classifier":
        return CLASSES[int(first_logits(lm, prompt).argmax())]
    said: tuple[int, ...] = ()
    while len(said) < n:
        said = (*said, int(first_logits(lm, prompt, said).argmax()))
        if said[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("kind", SAMPLE)
def test_generate_is_greedy_and_padding_does_not_matter(kind: str) -> None:
    lm = build_lm(kind)
    expected = [greedy(lm, prompt, 6) for prompt in PROMPTS]
    with unchanged(lm.model):
        assert lm.generate(PROMPTS, max_new_tokens=6) == expected
        assert lm.generate(PROMPTS[0], max_new_tokens=6) == expected[0]
    assert any(expected)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Callable[[LM, int], list[int]]:
    """The new tokens of `generate`, before they are put into words."""

    def generated(lm: LM, n: int) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(lm.tokenizer, "batch_decode", lambda rows, **_: rows.tolist())
            new: list[int] = lm.generate(PROMPTS[0], n)
            return new

    return generated


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_it_stops_at_the_end_token_or_after_so_many(
    kind: str, tokens: Callable[[LM, int], list[int]]
) -> None:
    lm = build_lm(kind)
    first = int(first_logits(lm, PROMPTS[0]).argmax())
    assert len(tokens(lm, 5)) == 5
    lm.model.generation_config.eos_token_id = first
    assert tokens(lm, 5) == [first]


@pytest.mark.parametrize("kind", ["llama", "t5-gated", "bart"])
def test_a_model_cannot_set_another_way_of_generating(kind: str) -> None:
    lm = build_lm(kind)
    expected = [greedy(lm, prompt, 8) for prompt in PROMPTS]
    own = lm.model.generation_config
    own.num_beams, own.repetition_penalty, own.no_repeat_ngram_size, own.min_length = 3, 1.7, 1, 30
    own.forced_eos_token_id = lm.tokenizer.eos_token_id
    assert lm.generate(PROMPTS, 8) == expected


@pytest.mark.parametrize(
    ("kind", "table"), [("gpt2", "n_positions"), *((k, "max_position_embeddings") for k in ("llama", "bart"))]
)
def test_generation_ends_where_the_context_does(
    kind: str, table: str, tokens: Callable[[LM, int], list[int]]
) -> None:
    lm = build_lm(kind, **{table: 24})
    lm.model.generation_config.eos_token_id = None  # never of its own accord
    said = 2 if kind == "bart" else len(lm.tokenizer(PROMPTS[0]).input_ids)
    assert lm.context == 24
    assert len(tokens(lm, 99)) == 24 - said


@pytest.mark.parametrize("kind", SAMPLE)
def test_next_logits_and_top(kind: str) -> None:
    lm = build_lm(kind)
    expected = torch.stack([first_logits(lm, prompt) for prompt in PROMPTS])
    found = lm.next_logits(PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    p = expected[0].softmax(-1)
    order = p.argsort(descending=True)[:4].tolist()
    top = lm.top(PROMPTS[0] + " " * (lm.kind == "causal"), k=4)
    names = CLASSES if lm.kind == "classifier" else [lm.tokenizer.decode([i]) for i in range(len(p))]
    assert [text for text, _ in top] == [names[i] for i in order]
    assert [value for _, value in top] == pytest.approx([float(p[i]) for i in order], rel=1e-4)


@pytest.mark.parametrize("kind", SAMPLE)
def test_logits_of_many_texts_are_those_of_each_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm(kind)
    texts = to_texts(lm, [(r.prompt, r.target) for r in records_for(lm, 5)])[::-1]
    for tokens in (30, 1024):  # a few at a time, and all in one batch
        monkeypatch.setattr("emendo.models.lm._BATCH_TOKENS", tokens)
        for text, rows in zip(texts, lm.logits(texts), strict=True):
            with torch.no_grad():
                expected = plain_logits(lm.model, collate([text]))
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_one_logit_is_a_yes_or_a_no(kind: str) -> None:
    lm = build_lm(kind, num_labels=1, id2label=None)
    assert lm.labels == ("false", "true")
    ids = lm.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        score = lm.model(ids).logits
    assert score.shape == (1, 1)
    yes = float(score.sigmoid())
    assert dict(lm.top(PROMPTS[0])) == pytest.approx({"true": yes, "false": 1 - yes}, rel=1e-5)
    assert lm.generate(PROMPTS[0]) == ("true" if yes > 0.5 else "false")
    no, true = lm.logits(to_texts(lm, [(PROMPTS[0], "false"), (PROMPTS[0], "TRUE")]))
    assert torch.equal(no, true)
    assert float(no[0, 0]) == 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_context_is_what_the_model_can_read(kind: str) -> None:
    """At the context's length the model runs; where its positions are a table, one more does not."""
    lm = build_lm(kind)
    if ARCHITECTURES[kind].type == "t5":
        assert lm.context is None  # relative positions
        return
    assert lm.context == CONTEXT
    reads = lm.model.get_encoder() if lm.kind == "seq2seq" else lm.model
    with torch.no_grad():
        reads(torch.full((1, CONTEXT), 5))
        if kind in ("gpt2", "gpt_neo", "opt", "bart", "bert", "roberta", "distilbert"):
            with pytest.raises((IndexError, RuntimeError)):
                reads(torch.full((1, CONTEXT + 1), 5))


def test_the_context_of_a_tokenizer_counts_too() -> None:
    lm = build_lm("t5")
    lm.tokenizer.model_max_length = 17
    assert lm.context == 17


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
def test_an_over_long_prompt_is_refused(kind: str) -> None:
    lm, long = build_lm(kind), "word " * CONTEXT
    for ask in (lm.generate, lm.top):
        with pytest.raises(RequestError, match=f"context is {CONTEXT}"):
            ask(long)


@pytest.mark.parametrize("prompt", ["", "  \n"])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_an_empty_prompt_is_refused(kind: str, prompt: str) -> None:
    lm = build_lm(kind)
    for ask in (lm.generate, lm.top):
        with pytest.raises(RequestError, match="prompt is empty"):
            ask(prompt)


def test_what_a_decoder_begins_and_ends_with() -> None:
    assert build_lm("t5").begins == (0,)
    assert build_lm("bart").begins == (2, 0)
    assert build_lm("bart").ends == (2,)
    lm = build_lm("bart", decoder_start_token_id=None)
    assert lm.begins == (0, 0)  # where none is named, the first token of texts
    lm = build_lm("t5", decoder_start_token_id=None, eos_token_id=[1, 5])
    assert lm.ends == (1, 5)
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        _ = lm.begins


@pytest.mark.parametrize("kind", of_kind("seq2seq", "classifier"))
def test_only_decoders_are_padded_on_the_left(kind: str) -> None:
    for name, side in ((kind, "right"), ("llama", "left")):
        lm = build_lm(name)
        short = lm._batch(PROMPTS)["attention_mask"][1]
        assert short.tolist() == sorted(short.tolist(), reverse=side == "right")
        assert not short.all()


def test_generation_projects_contiguous_rows(tiny_llama: LM) -> None:
    head = tiny_llama.model.get_output_embeddings()
    plain = tiny_llama.model.generate(
        **tiny_llama._batch(["a b c", "d e f"]), max_new_tokens=3, do_sample=False
    )
    seen: list[bool] = []
    with contiguous_projection(tiny_llama.model):
        watch = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
        same = tiny_llama.model.generate(
            **tiny_llama._batch(["a b c", "d e f"]), max_new_tokens=3, do_sample=False
        )
    watch.remove()
    assert seen and all(seen) and torch.equal(plain, same)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", ["perceiver", "canine"])
def test_a_model_without_token_embeddings_is_named(name: str) -> None:
    """Perceiver's table is a parameter; CANINE hashes characters."""
    sizes = {
        "num_hidden_layers": 1,
        "num_latents": 4,
        "d_latents": 8,
        "d_model": 8,
        "num_self_attends_per_block": 1,
    }
    heads = {
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
        "num_attention_heads": 1,
        "hidden_size": 64,
    }
    config = AutoConfig.for_model(name, **sizes, **heads)
    with pytest.raises(ModelError, match="has no table of token embeddings"):
        LM(AutoModelForSequenceClassification.from_config(config), build_lm("bert").tokenizer)
