"""Scores as pure functions: of token predictions, of generated text, and of lists of values.

Token predictions are laid out as in :mod:`emendo.losses`: ``predicted [n]`` and ``labels [n]`` are the label
positions of all examples one after the other, ``owner [n]`` says whose each is.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emendo.losses import per_example, token_nll

Z95 = 1.959963984540054
"""The 97.5% point of the normal distribution."""

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "‐": "-", "‑": "-"})
_OPENING = " \"'`*_([{<:-–—"
_CLOSING = " \"'`*_)]}>.,;:!?"


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"mean", "low", "high"}``."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The mean of values between 0 and 1, one for each fact, with the 95% Wilson score interval.

    For 0/1 values this is the usual interval of a proportion; unlike a bootstrap it does not shrink to a point when
    every fact succeeds. Where a fact's value is itself a mean (over its paraphrases) the interval is on the safe
    side, since no variable between 0 and 1 with mean p has a variance above p (1 - p).

    Args:
        values: one value for each fact.

    Returns:
        None when there are no values.

    Raises:
        ValueError: a value outside 0 to 1.
    """
    if not values:
        return None
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("mean_interval takes values between 0 and 1.")
    n, z2 = len(values), Z95**2
    mean = math.fsum(values) / n
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


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


def normalise(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, straight quotes, white space runs as one blank."""
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold()
    return " ".join(plain.split())


def answer_match(continuation: str, target: str) -> bool:
    """Whether a generated continuation begins with the target, as whole words.

    Both are normalised. Quotes, brackets, dashes and markup before the answer do not matter, nor does punctuation
    at the target's end; all other punctuation does. After the target the continuation must end or go on with
    something that is neither a letter nor a digit, and a number must not go on as a number: ``"Paris"`` is matched
    by ``" Paris, the"`` and ``" paris"``, not by ``" Parisian"``; ``"5"`` is not matched by ``" 5.2"``.

    Args:
        continuation: what the model wrote after the prompt.
        target: what it should have written.
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


def same_answer(before: str, after: str, answer: str) -> bool:
    """Whether two continuations begin with the same words, as many as the stored answer has.

    This is to locality what :func:`answer_match` is to success: it looks at the place of the answer and at no more.
    Words are compared normalised and without punctuation around them; the answer itself need not be among them,
    because what counts is that the edit changed nothing.

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


def bootstrap_interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[Tensor], Tensor],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """A statistic of sums over facts, with the 95% percentile interval of a bootstrap over the facts.

    Args:
        rows: ``[facts, columns]`` what each fact adds to the sums.
        statistic: float64 sums ``[..., columns]`` to values ``[...]``, such as a difference of two ratios.
        draws: how many times as many facts are drawn, with replacement.
        seed: of the draws.

    Returns:
        None when there are no facts. The bounds always enclose the statistic itself; where it is no finite number,
        neither are they.
    """
    if not rows:
        return None
    table, count = torch.tensor(rows, dtype=torch.float64), len(rows)
    value = float(statistic(table.sum(0)))
    if not math.isfinite(value):
        return Interval(value, value, value)
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(draws, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones(draws, count, dtype=torch.float64))
    low, high = statistic(times @ table).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, min(low, value), max(high, value))
