"""Words to tokens: prompts with their answers, as each kind of model reads them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from emendo.errors import RequestError
from emendo.models.chat import PLAIN, Framing
from emendo.models.lm import LM
from emendo.models.text import Text


def to_texts(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[Text]:
    """Tokenise ``(prompt, answer)`` pairs as the model reads them (see :mod:`emendo.models.text`).

    Args:
        lm: the model.
        pairs: prompts and answers; for a classifier an answer is the name of a class.

    Raises:
        RequestError: an empty prompt or answer, a text that does not fit the model's context, a name that is no class
            of the model's, or a slow tokenizer.
    """
    match lm.kind:
        case "causal":
            return encode(lm.tokenizer, pairs, max_tokens=lm.context, framing=lm.framing)
        case "seq2seq":
            return _sources_and_answers(lm, pairs)
        case "classifier":
            return _with_classes(lm, pairs)


def passage_texts(lm: LM, passages: Sequence[str], tokens: int) -> list[Text]:
    """Running text with all its tokens but the first as answer; a passage of a single token has none and is left out.

    Args:
        lm: a decoder.
        passages: the texts.
        tokens: the most tokens of a passage; what is longer is cut.

    Raises:
        RequestError: the model continues no texts.
    """
    if not passages:
        return []
    if lm.kind != "causal":
        raise RequestError(f"{lm.name} continues no texts, so it has no perplexity on passages; give none.")
    length = tokens if lm.context is None else min(tokens, lm.context)
    coded = lm.tokenizer(list(passages), truncation=True, max_length=length)["input_ids"]
    return [Text(tuple(ids), 1) for ids in coded if len(ids) > 1]


def _sources_and_answers(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[Text]:
    """The prompt for the encoder; for the decoder what it begins with and the answer with its end.

    What generation forces the decoder to begin with (BART) is read and not scored.
    """
    if not pairs:
        return []
    prompts, answers = _stripped(pairs)
    sources = lm.tokenizer(prompts, return_attention_mask=False)["input_ids"]
    targets = lm.tokenizer(text_target=answers, return_attention_mask=False)["input_ids"]
    forced = lm.begins[1:]
    texts = []
    for prompt, answer, source, target in zip(prompts, answers, sources, targets, strict=True):
        _check_tokens(lm, prompt, len(source), "prompt")
        bare = target[len(forced) :] if tuple(target[: len(forced)]) == forced else target
        words = [token for token in bare if token not in lm.ends]  # a tokenizer adds the end or does not
        ids = (*lm.begins, *words, *lm.ends[:1])
        _check_tokens(lm, answer, len(words) and len(ids) - 1, "target")
        texts.append(Text(ids, len(lm.begins), tuple(source)))
    return texts


def _with_classes(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[Text]:
    """The prompt, and the number of the class after it."""
    if not pairs:
        return []
    prompts, answers = _stripped(pairs)
    numbers = {label.casefold(): number for number, label in enumerate(lm.labels)}
    numbers |= {label: number for number, label in enumerate(lm.labels)}  # as spelt, before in any case
    texts = []
    coded = lm.tokenizer(prompts, return_attention_mask=False)["input_ids"]
    for prompt, answer, ids in zip(prompts, answers, coded, strict=True):
        _check_tokens(lm, prompt, len(ids), "prompt")
        number = numbers.get(answer, numbers.get(answer.casefold()))
        if number is None:
            raise RequestError(
                f"{answer!r} is no class of {lm.name}; a classifier can only be made to answer one of "
                f"{', '.join(map(repr, lm.labels))}."
            )
        texts.append(Text((*ids, number), len(ids)))
    return texts


def _check_tokens(lm: LM, text: str, tokens: int, what: str) -> None:
    """Make sure that a prompt or target is something to the model, and not too much."""
    if tokens == 0:
        raise RequestError(f"The tokenizer knows no token for the {what} {text!r}; give another one.")
    if lm.context is not None and tokens > lm.context:
        raise RequestError(
            f"The {what} has {tokens} tokens but the model's context is {lm.context}: shorten {text[:40]!r}..."
        )


def _stripped(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Prompts and answers without white space where they meet."""
    prompts = [prompt.rstrip() for prompt, _ in pairs]
    answers = [answer.strip() for _, answer in pairs]
    for prompt, answer in zip(prompts, answers, strict=True):
        if not prompt.strip():
            raise RequestError(
                f"The prompt is empty (target {answer!r}); give the text that comes before it."
            )
        if not answer:
            raise RequestError(
                f"The target is empty (prompt {prompt!r}); give the text that should follow it."
            )
    return prompts, answers


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_tokens: int | None = None,
    framing: Framing = PLAIN,
) -> list[Text]:
    """Tokenise ``(prompt, answer)`` pairs as one text each: ``prompt + " " + answer``, or as another framing says.

    The answer's span comes from the character offsets of that one tokenisation: every token that reaches
    beyond the prompt belongs to the answer.

    Args:
        tokenizer: a fast tokenizer.
        pairs: prompts and answers; white space where they meet does not matter.
        max_tokens: the model's context length.
        framing: how the prompt is put before the answer.

    Raises:
        RequestError: an empty prompt or answer, a text longer than ``max_tokens``, or a slow tokenizer.
    """
    if not pairs:
        return []
    if not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, by which the answer's tokens are found; "
            "a fast tokenizer is needed."
        )
    prompts, answers = _stripped(pairs)
    prompts = [framing.frame(prompt) for prompt in prompts]
    coded = tokenizer(
        [f"{prompt}{framing.gap}{answer}" for prompt, answer in zip(prompts, answers, strict=True)],
        add_special_tokens=framing.special,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    texts = []
    for prompt, answer, ids, offsets in zip(
        prompts, answers, coded["input_ids"], coded["offset_mapping"], strict=True
    ):
        answered = [i for i, (_, end) in enumerate(offsets) if end > len(prompt)]
        if not answered:
            raise RequestError(f"The tokenizer knows no token for the target {answer!r}; give another one.")
        start, stop = answered[0], answered[-1] + 1  # a closing special token has the offsets (0, 0)
        if start == 0:
            raise RequestError(f"The prompt {prompt!r} has no token of its own before the target {answer!r}.")
        if max_tokens is not None and stop > max_tokens:
            raise RequestError(
                f"The text has {stop} tokens but the model's context is {max_tokens}: shorten the prompt "
                f"({start} tokens) or the target ({stop - start} tokens)."
            )
        texts.append(Text(tuple(ids[:stop]), start))
    return texts
