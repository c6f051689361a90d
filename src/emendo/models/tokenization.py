"""From prompts and answers to tokens, as each kind of model reads them."""

from __future__ import annotations

from collections.abc import Sequence

from emendo.errors import RequestError
from emendo.models.framing import Pair, check_pair, encode, refuse_too_long
from emendo.models.lm import LM
from emendo.models.text import Text

__all__ = ["encode", "passage_texts", "to_texts"]


def to_texts(lm: LM, pairs: Sequence[Pair], *, closed: bool = False) -> list[Text]:
    """Tokenise prompts with their answers as the model reads them (see :mod:`emendo.models.text`).

    Args:
        lm: the model.
        pairs: prompts and answers, exactly as typed, and optionally the separator between them, which only decoders
            use (see :mod:`emendo.models.framing`). For a classifier an answer is the name of a class.
        closed: whether the end of the turn belongs to an answer in a chat template. It does in what an edit teaches:
            otherwise an edited model repeats its answer.

    Raises:
        RequestError: an empty prompt or answer, a text that does not fit the model's context, a token that the model
            does not have, or an answer that is not one of the classifier's classes.
    """
    match lm.kind:
        case "causal":
            texts = encode(lm.tokenizer, pairs, max_tokens=lm.context, framing=lm.framing, closed=closed)
        case "seq2seq":
            texts = _sources_and_answers(lm, pairs)
        case "classifier":
            texts = _prompts_and_classes(lm, pairs)
    lm.check_vocabulary(text.ids if lm.kind == "causal" else text.trunk for text in texts)
    return texts


def passage_texts(lm: LM, passages: Sequence[str], tokens: int) -> list[Text]:
    """Running text: every token but the first is the answer. A passage of one token is left out.

    Args:
        lm: a decoder.
        passages: the texts.
        tokens: the largest number of tokens of a passage; longer ones are truncated.

    Raises:
        RequestError: the model is not a decoder.
    """
    if not passages:
        return []
    if lm.kind != "causal":
        raise RequestError(
            f"{lm.name} does not continue texts, so it has no perplexity on passages; give none."
        )
    length = tokens if lm.context is None else min(tokens, lm.context)
    coded = lm.tokenizer(list(passages), truncation=True, max_length=length)["input_ids"]
    return [Text(tuple(ids), 1) for ids in coded if len(ids) > 1]


def _sources_and_answers(lm: LM, pairs: Sequence[Pair]) -> list[Text]:
    """The encoder reads the prompt; the decoder reads its start token and the answer, and predicts the end token.

    Tokens that generation forces after the start token (BART) are read and not scored. A token that the tokenizer puts
    before the answer and generation suppresses there is left out.
    """
    if not pairs:
        return []
    sources = _encode_prompts(lm, pairs)
    answers = [pair[1] for pair in pairs]
    targets = lm.tokenizer(text_target=answers, return_attention_mask=False, verbose=False)["input_ids"]
    forced = lm.begins[1:]
    texts = []
    for answer, source, target in zip(answers, sources, targets, strict=True):
        bare = target[len(forced) :] if tuple(target[: len(forced)]) == forced else target
        if bare and bare[0] in lm.never_first:
            bare = bare[1:]
        words = [
            token for token in bare if token not in lm.ends
        ]  # some tokenizers add the end token, others do not
        ids = (*lm.begins, *words, *lm.ends[:1])
        _check_length(lm, answer, len(words) and len(ids) - 1, "target")
        texts.append(Text(ids, len(lm.begins), source))
    return texts


def _prompts_and_classes(lm: LM, pairs: Sequence[Pair]) -> list[Text]:
    """The prompt, followed by the class number."""
    if not pairs:
        return []
    numbers = {label.casefold(): number for number, label in enumerate(lm.labels)}
    numbers |= {
        label: number for number, label in enumerate(lm.labels)
    }  # the exact spelling takes precedence
    texts = []
    for (_, answer, *_), ids in zip(pairs, _encode_prompts(lm, pairs), strict=True):
        label = answer.strip()
        number = numbers.get(label, numbers.get(label.casefold()))
        if number is None:
            raise RequestError(
                f"{label!r} is not a class of {lm.name}; its classes are {', '.join(map(repr, lm.labels))}."
            )
        texts.append(Text((*ids, number), len(ids)))
    return texts


def _encode_prompts(lm: LM, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    for prompt, answer, *_ in pairs:
        check_pair(prompt, answer)
        for text, what in ((prompt, "prompt"), (answer, "target")):
            refuse_too_long(lm.tokenizer, text, lm.context, what)
    prompts = [pair[0] for pair in pairs]
    coded = lm.tokenizer(prompts, return_attention_mask=False, verbose=False)["input_ids"]
    for prompt, ids in zip(prompts, coded, strict=True):
        _check_length(lm, prompt, len(ids), "prompt")
    return [tuple(ids) for ids in coded]


def _check_length(lm: LM, text: str, tokens: int, what: str) -> None:
    """Make sure that a prompt or target has a token, and fits the context."""
    if tokens == 0:
        raise RequestError(f"The tokenizer knows no token for the {what} {text!r}; give another one.")
    if lm.context is not None and tokens > lm.context:
        raise RequestError(
            f"The {what} has {tokens} tokens but the model's context is {lm.context}: shorten {text[:40]!r}..."
        )
