r"""How a decoder reads prompts and answers: as one text, exactly as typed, or in the tokenizer's chat template.

Editing, training, evaluation and generation all get their tokens here, so they read the same text::

    PLAIN           "The capital of France is" + " " + "Paris"
                    "### Response:\n"           + ""  + "Paris"
                    "法国的首都是"               + ""  + "巴黎"
    chat_framing    "<|user|>The capital of France is<|end|><|assistant|>" + "" + "Paris"

The tokens of a prompt never depend on its answer: :func:`encode_prompts` gives the tokens that generation starts from,
and :func:`encode` gives texts that begin with exactly those tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from emendo.errors import ModelError, RequestError
from emendo.models.text import Text

Pair = tuple[str, str] | tuple[str, str, str | None]
"""A prompt and its answer, and optionally the separator between them; None chooses it by :func:`separator`."""

_CHARS_PER_TOKEN = (
    8  # a prompt of more characters than this times the context is probed before it is tokenised whole
)
_MOST_TOKENS = 1_000_000  # of one text, where the model has no limit of its own

_UNSPACED = re.compile(  # scripts that are written without spaces between words
    "["
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u312f\u31a0-\u31ff\u3300-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f"  # Chinese, Japanese
    "\ua000-\ua4cf"  # Yi
    "\U0001b000-\U0001b2ff\U00020000-\U0003ffff"  # rare kana and ideographs
    "]"
)
_STRAIGHT_QUOTES = "\"'`"


@dataclass(frozen=True, slots=True)
class Framing:
    """How prompts and answers become one text.

    Attributes:
        description: the same in words, for reports.
        frame: maps a prompt to the text that the model reads before the answer.
        separator: maps a prompt and an answer to what stands between them.
        chat: whether prompts are put into a chat template, which brings its own special tokens.
        end: what ends an answer: a special token, behind the space that some templates put there; often nothing.
    """

    description: str
    frame: Callable[[str], str]
    separator: Callable[[str, str], str]
    chat: bool
    end: str = ""


def separator(prompt: str, answer: str) -> str:
    """A space where the prompt's script separates words by spaces and nothing separates the texts yet, else nothing.

    Nothing is put after white space, an opening bracket or quotation mark, or a script that is written without spaces
    (Chinese, Japanese, Thai, Lao, Khmer, Myanmar and others), nor before an answer that begins with white space.
    """
    last = prompt[-1:]
    if not last or last.isspace() or answer[:1].isspace() or _opens(prompt):
        return ""
    if _UNSPACED.match(last):
        return ""
    letter = next((char for char in reversed(prompt) if unicodedata.category(char)[0] in "LM"), "")
    both_unspaced = _UNSPACED.match(letter) and _UNSPACED.match(answer)
    return "" if both_unspaced else " "


def joined(prompt: str, answer: str, between: str | None = None) -> str:
    """A prompt, what stands between it and its answer (None chooses it by the script), and the answer."""
    return f"{prompt}{separator(prompt, answer) if between is None else between}{answer}"


def _opens(prompt: str) -> bool:
    """Whether the last character is an opening bracket or quotation mark."""
    last, before = prompt[-1], prompt[-2:-1]
    if unicodedata.category(last) in ("Ps", "Pi"):
        return True
    return last in _STRAIGHT_QUOTES and (
        not before or before.isspace() or unicodedata.category(before) == "Ps"
    )


PLAIN = Framing("as they stand", lambda prompt: prompt, separator, chat=False)
"""The prompt exactly as typed, a space where the script needs one, and the answer exactly as typed."""


def chat_framing(tokenizer: Any, name: str) -> Framing:
    """The tokenizer's chat template: the prompt is a user's turn, the answer begins the assistant's.

    Args:
        tokenizer: the model's tokenizer.
        name: the model's name, for the error.

    Raises:
        ModelError: the tokenizer has no chat template, or one that does not accept a user's turn and an answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"The tokenizer of {name} has no chat template, so no prompt can be put into one: take an "
            "instruction-tuned model, or leave chat out."
        )

    def frame(prompt: str) -> str:
        turn = {"role": "user", "content": prompt}
        text: str = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return text

    try:
        space, end = _around_answer(tokenizer, frame)
    except Exception as error:  # a template is a program and can raise anything
        raise ModelError(
            f"The chat template of {name} does not accept a user's turn and an answer: {error}"
        ) from error

    def between(_: str, answer: str) -> str:
        return "" if answer[:1].isspace() else space

    return Framing("a user's turn in the tokenizer's chat template", frame, between, chat=True, end=end)


def _around_answer(tokenizer: Any, frame: Callable[[str], str]) -> tuple[str, str]:
    """What a template puts around the assistant's answer: white space before it, and what ends it.

    Most put no white space there, Llama 2's puts a space.
    """
    prompt, answer = "Q", "A"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    conversation: str = tokenizer.apply_chat_template(turns, tokenize=False)
    before, found, rest = conversation.partition(frame(prompt))
    stripped = rest.lstrip()
    if not (found and not before and stripped.startswith(answer)):
        return "", ""
    behind = stripped.removeprefix(answer)
    gap = behind[: len(behind) - len(behind.lstrip(" "))]
    special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    end = next((f"{gap}{token}" for token in special if behind.lstrip(" ").startswith(token)), "")
    return rest[: len(rest) - len(stripped)], end


# ------------------------------------------------------------------------------------------------ tokens


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], *, max_tokens: int | None = None, framing: Framing = PLAIN
) -> list[tuple[int, ...]]:
    """The tokens of prompts, from which generation starts.

    A space at the end of a prompt is left to the answer, because tokenizers make it part of the next word (" Paris" is
    one token). So a prompt with that space and the same prompt without it ask for the same answer.

    Args:
        tokenizer: the model's tokenizer.
        prompts: the texts to continue.
        max_tokens: the model's context length.
        framing: how the model reads prompts.

    Raises:
        RequestError: an empty prompt, one far beyond the context, or text that is not valid Unicode.
    """
    check_prompts(prompts)
    heads = [_head(framing.frame(prompt), framing) for prompt in prompts]
    for head in heads:
        refuse_too_long(tokenizer, head, max_tokens, "prompt")
    found = _token_ids(tokenizer, heads, special=not framing.chat)
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise RequestError(
                f"The tokenizer knows no token for the prompt {prompt[:40]!r}; give another one."
            )
    return found


def encode(
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    max_tokens: int | None = None,
    framing: Framing = PLAIN,
    closed: bool = False,
) -> list[Text]:
    """Tokenise prompts with their answers as one text each: the prompt, the separator, the answer.

    A text begins with the tokens of :func:`encode_prompts`; all other tokens belong to the answer. Usually those are
    the first tokens of the whole text. Where a token would reach across the border, prompt and answer are tokenised
    apart.

    Args:
        tokenizer: the model's tokenizer.
        pairs: prompts and answers, exactly as the model reads them.
        max_tokens: the model's context length.
        framing: how the model reads prompts.
        closed: whether the framing's end of an answer belongs to every answer.

    Raises:
        RequestError: an empty prompt or answer, a text longer than ``max_tokens``, or text that is not valid Unicode.
    """
    if not pairs:
        return []
    framed, wholes = [], []
    for prompt, answer, *between in pairs:
        check_pair(prompt, answer)
        gap = framing.separator(prompt, answer) if not between or between[0] is None else between[0]
        framed.append(framing.frame(prompt))
        wholes.append(f"{framed[-1]}{gap}{answer}{framing.end if closed else ''}")
        refuse_too_long(tokenizer, wholes[-1], max_tokens, "text")
    special = not framing.chat
    heads = [_head(text, framing) for text in framed]
    head_ids, whole_ids = (_token_ids(tokenizer, texts, special=special) for texts in (heads, wholes))
    texts = []
    for pair, head, first, whole, ids in zip(pairs, heads, head_ids, wholes, whole_ids, strict=True):
        if ids[: len(first)] != first:
            ids = first + _token_ids(tokenizer, [whole[len(head) :]], special=False)[0]
        texts.append(_checked_text(pair, ids, len(first), max_tokens))
    return texts


def _checked_text(pair: Pair, ids: tuple[int, ...], start: int, max_tokens: int | None) -> Text:
    if len(ids) == start:
        raise RequestError(f"The tokenizer knows no token for the target {pair[1]!r}; give another one.")
    if start == 0:
        raise RequestError(f"The tokenizer knows no token for the prompt {pair[0]!r}; give another one.")
    if max_tokens is not None and len(ids) > max_tokens:
        raise RequestError(
            f"The text has {len(ids)} tokens but the model's context is {max_tokens}: shorten the prompt "
            f"({start} tokens) or the target ({len(ids) - start} tokens)."
        )
    return Text(ids, start)


def _token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[tuple[int, ...]]:
    """Token ids, without the special tokens that the tokenizer puts behind a text."""
    coded = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_special_tokens_mask=True,
        verbose=False,  # no warning of texts beyond the context, which are refused
    )
    found = []
    for ids, mask in zip(coded["input_ids"], coded["special_tokens_mask"], strict=True):
        stop = len(ids)
        while special and stop and mask[stop - 1]:
            stop -= 1
        found.append(tuple(ids[:stop] if stop else ids))
    return found


def _head(framed: str, framing: Framing) -> str:
    """A framed prompt without the space at its end, which tokenizers make part of the next word.

    In a chat template nothing is left to the answer: the template says where it begins.
    """
    return framed if framing.chat else framed.removesuffix(" ")


# ------------------------------------------------------------------------------------------------ checks


def check_pair(prompt: str, answer: str) -> None:
    """Make sure that a prompt and an answer can be tokenised.

    Raises:
        RequestError: one of them is empty or not valid Unicode.
    """
    if not prompt.strip():
        raise RequestError(f"The prompt is empty (target {answer!r}); give the text that comes before it.")
    if not answer.strip():
        raise RequestError(f"The target is empty (prompt {prompt!r}); give the text that should follow it.")
    _check_unicode("prompt", prompt)
    _check_unicode("target", answer)


def check_prompts(prompts: Iterable[str]) -> None:
    """Make sure that prompts can be tokenised.

    Raises:
        RequestError: one of them is empty or not valid Unicode.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise RequestError("The prompt is empty; give the text to continue.")
        _check_unicode("prompt", prompt)


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The {what} is not valid Unicode: character {error.start + 1} is half of a surrogate pair "
            f"(U+{ord(text[error.start]):04X}). Give it as UTF-8; in an ASCII locale set PYTHONUTF8=1."
        ) from error


def refuse_too_long(tokenizer: Any, text: str, max_tokens: int | None, what: str) -> None:
    """Refuse a text far beyond the context by its beginning alone, so that no huge text is tokenised.

    Raises:
        RequestError: the beginning does not fit already.
    """
    limit = _MOST_TOKENS if max_tokens is None else max_tokens
    start = text[: limit * _CHARS_PER_TOKEN]
    if len(start) < len(text) and len(_token_ids(tokenizer, [start], special=False)[0]) > limit:
        raise RequestError(
            f"The {what} has {len(text):,} characters and more than {limit} tokens, but "
            + (
                "at most that many are read at once"
                if max_tokens is None
                else f"the model's context is {limit}"
            )
            + f": shorten {text[:40]!r}..."
        )
