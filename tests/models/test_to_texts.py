"""Prompts and answers as encoder-decoders and classifiers read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, processors, trainers
from transformers import PreTrainedTokenizerFast

from cases import ARCHITECTURES, CLASSES, CONTEXT, build_lm, of_kind, plain_logits, records_for
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.text import Text, collate
from emendo.models.tokenization import encode, to_texts

PROMPT, ANSWER = "Where is Bababa?", "Old Town"


def ids(lm: LM, text: str) -> tuple[int, ...]:
    """The tokens of a text without anything around them."""
    return tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture(scope="module", params=of_kind("seq2seq"))
def seq2seq(request: pytest.FixtureRequest) -> LM:
    return build_lm(request.param)


@pytest.fixture(scope="module", params=of_kind("classifier"))
def classifier(request: pytest.FixtureRequest) -> LM:
    return build_lm(request.param)


def test_a_decoder_reads_prompt_and_answer_as_one_text() -> None:
    lm = build_lm("llama")
    assert to_texts(lm, [(PROMPT, ANSWER)]) == encode(lm.tokenizer, [(PROMPT, ANSWER)], max_tokens=CONTEXT)


def test_t5_reads_the_prompt_and_answers_from_its_start_token_to_the_end_token() -> None:
    lm = build_lm("t5")
    (text,) = to_texts(lm, [(PROMPT, ANSWER)])
    pad, end = 0, 1
    assert text == Text((pad, *ids(lm, ANSWER), end), 1, (*ids(lm, PROMPT), end))
    assert text.labels == (*ids(lm, ANSWER), end)
    assert text.trunk == text.source


def test_bart_reads_its_forced_first_token_and_is_not_scored_on_it() -> None:
    lm = build_lm("bart")
    (text,) = to_texts(lm, [(PROMPT, ANSWER)])
    begin, end = 0, 2
    assert text == Text((end, begin, *ids(lm, ANSWER), end), 2, (begin, *ids(lm, PROMPT), end))
    assert text.inputs == (end, begin, *ids(lm, ANSWER))
    assert text.labels == (*ids(lm, ANSWER), end)


def test_without_a_forced_first_token_bart_is_scored_on_it() -> None:
    lm = build_lm("bart")
    lm.model.generation_config.forced_bos_token_id = None
    (text,) = to_texts(lm, [(PROMPT, ANSWER)])
    assert text.labels == (0, *ids(lm, ANSWER), 2)
    assert text.inputs[0] == 2


@pytest.mark.parametrize("template", ["$A", "$A <|end|>"], ids=["no end of its own", "an end of its own"])
def test_the_end_token_comes_once(template: str) -> None:
    lm = build_lm("t5")
    backend: Any = lm.tokenizer
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|end|>", 1)]
    )
    (text,) = to_texts(lm, [(PROMPT, ANSWER)])
    assert text.ids == (0, *ids(lm, ANSWER), 1)


def test_the_answer_is_what_the_model_would_have_to_generate(seq2seq: LM) -> None:
    """Teacher forced on what it generates by itself, every label is the argmax."""
    lm = seq2seq
    prompts = [record.prompt for record in records_for(lm, 8)]
    for prompt in prompts:
        out = lm.model.generate(
            **lm.tokenizer(prompt, return_tensors="pt"), max_new_tokens=7, do_sample=False
        )[0]
        said = tuple(out.tolist())
        text = Text(said, len(lm.begins), tuple(lm.tokenizer(prompt).input_ids))
        assert said[: text.start] == lm.begins
        found = plain_logits(lm.model, collate([text])).argmax(-1)
        free = len(found) - (lm.ends[0] == said[-1])  # BART is made to end
        assert found[:free].tolist() == list(text.labels[:free])


def test_many_at_once_are_the_same_as_one_by_one(seq2seq: LM, classifier: LM) -> None:
    for lm in (seq2seq, classifier):
        pairs = [(record.prompt, record.target) for record in records_for(lm, 6)]
        texts = to_texts(lm, pairs)
        assert texts == [text for pair in pairs for text in to_texts(lm, [pair])]
        assert to_texts(lm, []) == []


def test_a_class_by_its_name(classifier: LM) -> None:
    lm = classifier
    for number, name in enumerate(CLASSES):
        for spelt in (name, name.lower(), name.upper(), f" {name} "):
            (text,) = to_texts(lm, [(PROMPT, spelt)])
            read = tuple(lm.tokenizer(PROMPT).input_ids)
            assert text == Text((*read, number), len(read))
            assert text.inputs == text.trunk == read
            assert text.labels == (number,)


def test_two_classes_that_differ_in_case_alone() -> None:
    lm = build_lm("bert", id2label={0: "us", 1: "US", 2: "them"})
    assert [text.labels[0] for text in to_texts(lm, [("x", "us"), ("x", "US"), ("x", "THEM")])] == [0, 1, 2]


def test_encoders_read_prompts_as_typed(seq2seq: LM, classifier: LM) -> None:
    typed = f"\t{PROMPT}\n "
    for lm, answer in ((seq2seq, ANSWER), (classifier, CLASSES[0])):
        (text,) = to_texts(lm, [(typed, answer)])
        assert text.trunk == tuple(lm.tokenizer(typed).input_ids)
        assert lm.prompt_texts([typed])[0].trunk == text.trunk
        (asked,) = lm._batch([typed])["input_ids"].tolist()
        assert tuple(asked) == text.trunk
    (text,) = to_texts(seq2seq, [(PROMPT, f" {ANSWER}\n")])
    assert text.labels[:-1] == ids(seq2seq, f" {ANSWER}\n")


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_tokens_that_the_model_does_not_know(kind: str) -> None:
    """Some tokenizers have more tokens than their model; only texts that use those are refused."""
    lm = build_lm(kind)
    answer = CLASSES[1]
    expected = to_texts(lm, [(PROMPT, answer)])
    lm.tokenizer.add_tokens(["<image>"])
    assert to_texts(lm, [(PROMPT, answer)]) == expected
    for call in (lambda: to_texts(lm, [(f"{PROMPT}<image>", answer)]), lambda: lm.generate("An <image>")):
        with pytest.raises(RequestError, match=f"'<image>' has the id .*{lm.name} knows only"):
            call()


@pytest.mark.parametrize("answer", ["Paris", "2", "Supported."])
def test_an_unknown_class(classifier: LM, answer: str) -> None:
    with pytest.raises(RequestError) as error:
        to_texts(classifier, [(PROMPT, "Unknown"), (PROMPT, answer)])
    assert repr(answer) in str(error.value)
    assert "'Refuted', 'Supported', 'Unknown'" in str(error.value)
    assert classifier.name in str(error.value)


@pytest.mark.parametrize("kind", ["bart", "bert", "roberta", "distilbert"])
def test_an_over_long_prompt(kind: str) -> None:
    lm, answer = build_lm(kind), CLASSES[0]
    frame = len(lm.tokenizer("").input_ids)
    fits = "!" * (CONTEXT - frame)
    (text,) = to_texts(lm, [(fits, answer)])
    assert len(text.trunk) == CONTEXT
    lm.logits([text])  # and the model can read it
    words = f"prompt has {CONTEXT + 1} tokens .* context is {CONTEXT}.*'!!!!"
    with pytest.raises(RequestError, match=words):
        to_texts(lm, [(f"{fits}!", answer)])


def test_an_over_long_target() -> None:
    lm = build_lm("bart")
    fits = "!" * (CONTEXT - 2)  # with </s> <s> before it
    (text,) = to_texts(lm, [(PROMPT, fits)])
    assert len(text.inputs) == CONTEXT
    lm.logits([text])
    with pytest.raises(RequestError, match=f"target has {CONTEXT + 1} tokens .* context is {CONTEXT}"):
        to_texts(lm, [(PROMPT, f"{fits}!")])


def test_relative_positions_have_no_end() -> None:
    lm = build_lm("t5-gated")
    (text,) = to_texts(lm, [("word " * 3 * CONTEXT, "word " * 2 * CONTEXT)])
    assert len(text.source) > 3 * CONTEXT
    assert torch.isfinite(lm.logits([text])[0]).all()


def test_the_limit_of_a_tokenizer() -> None:
    lm = build_lm("t5")
    lm.tokenizer.model_max_length = 50
    with pytest.raises(RequestError, match="context is 50"):
        to_texts(lm, [("word " * CONTEXT, "x")])


@pytest.mark.parametrize(
    ("prompt", "answer", "words"), [("", "x", "prompt is empty"), ("x", " \n", "target is empty")]
)
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_empty_texts(kind: str, prompt: str, answer: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        to_texts(build_lm(kind), [(PROMPT, CLASSES[0]), (prompt, answer)])


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_texts_without_a_token(kind: str) -> None:
    lm = build_lm(kind)
    backend = Tokenizer(models.BPE())  # not byte-level: characters that it has not seen vanish
    backend.train_from_iterator(["abcdefghijklmnopqrstuvwxyzRSU"], trainers.BpeTrainer(show_progress=False))
    blind = LM(lm.model, PreTrainedTokenizerFast(tokenizer_object=backend), lm.name)
    (text,) = to_texts(blind, [("aé", CLASSES[0])])
    assert len(text.trunk) == 1
    with pytest.raises(RequestError, match="no token for the prompt 'é'"):
        to_texts(blind, [("é", CLASSES[0])])
    if ARCHITECTURES[kind].kind == "seq2seq":
        with pytest.raises(RequestError, match="no token for the target 'é'"):
            to_texts(blind, [("x", "é")])
