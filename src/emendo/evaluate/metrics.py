"""Scores as pure functions of token predictions and of generated text.

Token predictions are laid out as in :mod:`emendo.models.losses`: ``predicted [n]`` and ``labels [n]`` are the label
positions of all examples one after the other, ``owner [n]`` says whose each is.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from emendo.models.losses import per_example, token_nll

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "‐": "-", "‑": "-"})
_OPENING = " \"'`*_([{<:-–—"
_CLOSING = " \"'`*_)]}>.,;:!?"


def token_match(predicted: Tensor, labels: Tensor, owner: Tensor, examples: int) -> Tensor:
    """The fraction of each example's label tokens that are predicted, ``[examples]``."""
    return per_example((predicted == labels).double(), owner, examples)


def all_match(predicted: Tensor, labels: Tensor, owner: Tensor, examples: int) -> Tensor:
    """Whether all of each example's label tokens are predicted, ``[examples]`` bool."""
    wrong = torch.zeros(examples, dtype=torch.long, device=owner.device)
    return wrong.index_add(0, owner, (predicted != labels).long()) == 0


def answer_probability(logits: Tensor, labels: Tensor, owner: Tensor, examples: int) -> Tensor:
    """The probability of each example's whole answer, the product over its tokens, ``[examples]``.

    Args:
        logits: ``[n, vocabulary]``.
        labels: ``[n]``.
        owner: ``[n]``.
        examples: how many examples there are.
    """
    nll = token_nll(logits, labels)
    return nll.new_zeros(examples).index_add(0, owner, -nll).exp()


def mean_nll(logits: Tensor, labels: Tensor, owner: Tensor, examples: int) -> Tensor:
    """The NLL of each example's answer per token, in nats, ``[examples]``; the arguments are as above."""
    return per_example(token_nll(logits, labels), owner, examples)


def answer_rank(logits: Tensor, labels: Tensor, owner: Tensor, examples: int) -> Tensor:
    """The rank of each example's answer: that of its worst token, 1 for the argmax, ``[examples]``.

    Only strictly more likely tokens come before a token. NaN logits give the last rank.
    """
    own = logits.gather(-1, labels[:, None])
    ranks = 1 + (logits > own).sum(-1)
    ranks = torch.where(own.squeeze(-1).isnan(), logits.shape[-1], ranks)
    return ranks.new_zeros(examples).scatter_reduce(0, owner, ranks, "amax")


def normalise(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, straight quotes, white space runs as one blank."""
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold()
    return " ".join(plain.split())


def answer_match(continuation: str, target: str) -> bool:
    """Whether a generated continuation begins with the target, as whole words.

    Both are normalised. Quotes, brackets, dashes and markup before the answer do not matter, nor does punctuation
    at the target's end; all other punctuation does. The target must be followed by the end of the text or by a
    character that is neither a letter nor a digit, and a number must not continue as a number: ``"Paris"`` is
    matched by ``" Paris, the"`` and ``" paris"``, not by ``" Parisian"``; ``"5"`` is not matched by ``" 5.2"``.

    Args:
        continuation: the text that the model generated after the prompt.
        target: the expected text.
    """
    text = normalise(continuation).lstrip(_OPENING)
    wanted = normalise(target).lstrip(_OPENING)
    wanted = wanted.rstrip(_CLOSING) or wanted
    if not wanted or not text.startswith(wanted):
        return False
    rest = text[len(wanted) :]
    if wanted[-1].isdigit() and re.match(r"[.,]\d", rest):
        return False
    return not (rest and wanted[-1].isalnum() and rest[0].isalnum())


def first_line(continuation: str) -> str:
    """The first line that has text: a greedy continuation up to its natural stop."""
    return continuation.strip().split("\n", 1)[0].rstrip()


def first_answer(continuation: str) -> str:
    """A continuation up to its natural stop: the first line that has text, up to the end of its first sentence.

    A sentence ends with ``.``, ``!`` or ``?`` before white space; not after a single letter, as in initials.
    """
    line = first_line(continuation)
    ends = (m.start() for m in re.finditer(r"(?<!\b[^\W\d])[.!?](?=[\"'”’)\]]*(\s|$))", line))
    return line[: next(ends, len(line))]


def full_match(continuation: str, target: str) -> bool:
    """Whether a generated answer is the target and nothing else, from its beginning to its natural stop.

    Case, quotes and surrounding punctuation do not matter; an answer that continues after the target does not match:
    ``"New York"`` is matched by ``" new york. It is"``, not by ``" New York City"`` or ``" New York, which"``.

    Args:
        continuation: the text that the model generated after the prompt.
        target: the expected text.
    """

    def bare(text: str) -> str:
        return normalise(text).strip(_OPENING + _CLOSING) or normalise(text)

    line, wanted = first_line(continuation), normalise(target)
    if not bare(target):
        return False
    if wanted[-1] in ".!?" and f"{normalise(line)} ".startswith(
        f"{wanted} "
    ):  # it brings its own stop: "D.C."
        return True
    return bare(target) in (bare(first_answer(continuation)), bare(line))


def same_answer(before: str, after: str, answer: str) -> bool:
    """Whether two continuations begin with the same words, as many as the stored answer has.

    The counterpart of :func:`answer_match` for locality: it compares the place of the answer and nothing after it.
    Words are compared normalised and without punctuation around them; the answer itself need not be among them,
    because locality only asks whether the edit changed anything.

    Args:
        before: the clean model's continuation.
        after: the edited model's.
        answer: the stored answer.
    """
    count = max(1, len(normalise(answer).split()))

    def words(text: str) -> list[str]:
        found = [word.strip(_OPENING + _CLOSING) or word for word in normalise(first_line(text)).split()]
        return found[:count]

    return words(before) == words(after)


def unchanged(before: str, after: str) -> bool:
    """Whether two continuations are the same text, letter by letter, up to their natural stop."""
    return first_line(before) == first_line(after)


def perplexity(nll: Tensor, tokens: Tensor) -> Tensor:
    """``exp(sum of NLL / number of tokens)``: token weighted, over whatever was summed.

    Args:
        nll: ``[...]`` sums of NLL in nats.
        tokens: ``[...]`` how many tokens each sum is over.
    """
    return (nll / tokens).exp()


def ngram_entropy(text: str) -> float:
    """Generation entropy of a text, as ROME and MEMIT report it: a fluent text has about 5 to 6, a loop far less.

    The mean of 2/3 of the entropy of its bigrams and 4/3 of that of its trigrams, in bits, over words.
    """
    words = text.split()
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's word n-grams that have occurred in it before; 0 for a text that never repeats itself."""
    words = text.split()
    grams = [*zip(*(words[i:] for i in range(n)), strict=False)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
