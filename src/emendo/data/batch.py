"""Texts to tokens: one tokenisation of ``prompt + " " + answer`` gives both the ids and the answer's span."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emendo.errors import RequestError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenised prompt and answer.

    Attributes:
        ids: token ids of the whole text.
        start: index of the answer's first token; at least 1, because a label needs a token before it.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only ever predicted."""
        return self.ids[:-1]

    @property
    def labels(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.ids[self.start :]


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Several texts, padded; the label positions of all of them one after the other.

    Attributes:
        input_ids: ``[texts, tokens]``.
        attention_mask: ``[texts, tokens]``, 1 for text and 0 for padding.
        positions: ``[n]`` indices into the flattened ``texts * tokens``: where each label is predicted.
        labels: ``[n]`` the answers' tokens.
        owner: ``[n]`` the text each label belongs to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    labels: Tensor
    owner: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_tokens: int | None = None,
) -> list[Text]:
    """Tokenise ``(prompt, answer)`` pairs as ``prompt + " " + answer``.

    The answer's span comes from the character offsets of that one tokenisation: every token that reaches
    beyond the prompt belongs to the answer.

    Args:
        tokenizer: a fast tokenizer.
        pairs: prompts and answers; white space where they meet does not matter.
        max_tokens: the model's context length.

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
    coded = tokenizer(
        [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)],
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


def collate(texts: Sequence[Text], pad_id: int = 0, side: Literal["left", "right"] = "right") -> TokenBatch:
    """Pad texts to one length. The padding's id is never seen by the model, being masked."""
    length = max(len(text.ids) - 1 for text in texts)
    input_ids = torch.full((len(texts), length), pad_id)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    positions: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for row, text in enumerate(texts):
        inputs = text.inputs
        at = 0 if side == "right" else length - len(inputs)
        input_ids[row, at : at + len(inputs)] = torch.tensor(inputs)
        mask[row, at : at + len(inputs)] = 1
        first = row * length + at + text.start - 1
        positions += range(first, first + len(text.labels))
        labels += text.labels
        owner += [row] * len(text.labels)
    return TokenBatch(input_ids, mask, torch.tensor(positions), torch.tensor(labels), torch.tensor(owner))


def length_buckets(items: Sequence[T], length: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Sort by length and cut into batches of at most ``tokens`` padded tokens each (but at least one item)."""
    ordered = sorted(items, key=length)
    batch: list[T] = []
    for item in ordered:
        if batch and (len(batch) + 1) * length(item) > tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
