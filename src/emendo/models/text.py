"""Tokenised prompts with their answers, one at a time and padded into batches.

One form serves every kind of model. The *answer* is the end of ``ids``; the model reads ``inputs``, and
``source`` if it has an encoder:

===============  ====================================================  ============  ======================
kind of model    ``ids``                                               ``source``    answer
===============  ====================================================  ============  ======================
decoder          prompt and answer                                     empty         tokens
encoder-decoder  the decoder's start token, the answer, the end token  the prompt    tokens, the end token
classifier       prompt and class number                               empty         one class
===============  ====================================================  ============  ======================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenised prompt and answer.

    Attributes:
        ids: token ids of the whole text; for an encoder-decoder, those of its decoder.
        start: index of the answer's first token; at least 1, because a label needs a token before it.
        source: token ids that the encoder reads; empty for models without one.
    """

    ids: tuple[int, ...]
    start: int
    source: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model (or its decoder) reads: all but the last, which is only predicted."""
        return self.ids[:-1]

    @property
    def labels(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.ids[self.start :]

    @property
    def trunk(self) -> tuple[int, ...]:
        """The tokens that the frozen blocks read: the source, else the inputs."""
        return self.source or self.inputs

    @property
    def size(self) -> int:
        """The number of tokens that the model reads."""
        return len(self.source) + len(self.ids) - 1


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Several texts, padded; the label positions of all of them are concatenated.

    Attributes:
        input_ids: ``[texts, tokens]``.
        attention_mask: ``[texts, tokens]``, 1 for text and 0 for padding.
        positions: ``[n]`` indices into the flattened ``texts * tokens`` at which the labels are predicted.
        labels: ``[n]`` the answers' tokens.
        owner: ``[n]`` index of the text that each label belongs to.
        source_ids: ``[texts, source tokens]`` for an encoder, padded on the right; None for models without one.
        source_mask: ``[texts, source tokens]``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    labels: Tensor
    owner: Tensor
    source_ids: Tensor | None = None
    source_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trunk_mask(self) -> Tensor:
        """``[texts, tokens]``: 1 for the tokens that the frozen blocks read."""
        return self.attention_mask if self.source_mask is None else self.source_mask


def collate(texts: Sequence[Text], pad_id: int = 0, side: Literal["left", "right"] = "right") -> TokenBatch:
    """Pad texts to one length. Padding is masked, so its id does not matter."""
    input_ids, mask = padded([text.inputs for text in texts], pad_id, side)
    source_ids, source_mask = None, None
    if any(text.source for text in texts):
        source_ids, source_mask = padded([text.source for text in texts], pad_id, "right")
    length = input_ids.shape[1]
    positions: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for row, text in enumerate(texts):
        at = 0 if side == "right" else length - len(text.inputs)
        first = row * length + at + text.start - 1
        positions += range(first, first + len(text.labels))
        labels += text.labels
        owner += [row] * len(text.labels)
    return TokenBatch(
        input_ids,
        mask,
        torch.tensor(positions),
        torch.tensor(labels),
        torch.tensor(owner),
        source_ids,
        source_mask,
    )


def padded(
    rows: Sequence[tuple[int, ...]], pad_id: int, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Token ids and their mask (1 for text), both ``[rows, longest]``."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        at = 0 if side == "right" else length - len(row)
        ids[i, at : at + len(row)] = torch.tensor(row)
        mask[i, at : at + len(row)] = 1
    return ids, mask


def length_buckets(items: Sequence[T], length: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Sort by length and split into batches of at most ``tokens`` padded tokens (but at least one item)."""
    ordered = sorted(items, key=length)
    batch: list[T] = []
    for item in ordered:
        if batch and (len(batch) + 1) * length(item) > tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def greedy(
    logits: Callable[[Sequence[Text]], list[Tensor]],
    texts: Sequence[Text],
    new: int,
    *,
    done: Callable[[int, list[int]], bool],
    limit: int | None = None,
) -> list[list[int]]:
    """Greedy decoding by repeated teacher-forced passes, one for each new token.

    Slower than a model's own generation, which caches keys and values, but it works for any function that gives logits.

    Args:
        logits: maps texts to the logits ``[labels, vocabulary]`` of each.
        texts: the texts to continue; their answers so far count from ``start``.
        new: the largest number of tokens to add.
        done: whether a text is finished, from its index and the tokens added so far.
        limit: the largest number of ids in a text.

    Returns:
        The tokens added to each text.
    """
    added: list[list[int]] = [[] for _ in texts]
    unfinished = list(range(len(texts)))
    for _ in range(new):
        so_far = {i: (*texts[i].ids, *added[i]) for i in unfinished}
        unfinished = [i for i, ids in so_far.items() if limit is None or len(ids) < limit]
        queries = [replace(texts[i], ids=(*so_far[i], 0)) for i in unfinished]  # the last id is not read
        for i, rows in zip(unfinished, logits(queries) if queries else (), strict=True):
            added[i].append(int(rows[-1].argmax()))
        unfinished = [i for i in unfinished if not done(i, added[i])]
    return added
