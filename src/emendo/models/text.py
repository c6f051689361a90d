"""Tokenised prompts with their answers, one at a time and padded into batches.

One form serves every kind of model. What the model is to say, the *answer*, is the end of ``ids``; what it reads is
``inputs``, and beside it ``source`` where an encoder reads the prompt:

=============  ============================================  ======================  ===================
kind of model  ``ids``                                       ``source``              an answer is
=============  ============================================  ======================  ===================
decoder        prompt and answer                             none                    tokens
encoder-       the decoder's start token and the answer,     the prompt              tokens and the end
decoder        its end token included
classifier     prompt and the number of the class            none                    one class
=============  ============================================  ======================  ===================
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
        ids: token ids of the whole text (for an encoder-decoder: of what its decoder is concerned with).
        start: index of the answer's first token; at least 1, because a label needs a token before it.
        source: what an encoder-decoder's encoder reads; empty for other models.
    """

    ids: tuple[int, ...]
    start: int
    source: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model (or its decoder) reads: all but the last token, which is only ever predicted."""
        return self.ids[:-1]

    @property
    def labels(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.ids[self.start :]

    @property
    def trunk(self) -> tuple[int, ...]:
        """What the frozen blocks read: the source, else the inputs."""
        return self.source or self.inputs

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return len(self.source) + len(self.ids) - 1


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Several texts, padded; the label positions of all of them one after the other.

    Attributes:
        input_ids: ``[texts, tokens]``.
        attention_mask: ``[texts, tokens]``, 1 for text and 0 for padding.
        positions: ``[n]`` indices into the flattened ``texts * tokens``: where each label is predicted.
        labels: ``[n]`` the answers' tokens.
        owner: ``[n]`` the text each label belongs to.
        source_ids: ``[texts, source tokens]`` for an encoder, padded on the right; None for other models.
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
        """``[texts, tokens]``: which tokens the frozen blocks read."""
        return self.attention_mask if self.source_mask is None else self.source_mask


def collate(texts: Sequence[Text], pad_id: int = 0, side: Literal["left", "right"] = "right") -> TokenBatch:
    """Pad texts to one length. The padding's id is never seen by the model, being masked."""
    input_ids, mask = _padded([text.inputs for text in texts], pad_id, side)
    source_ids, source_mask = None, None
    if any(text.source for text in texts):
        source_ids, source_mask = _padded([text.source for text in texts], pad_id, "right")
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


def _padded(
    rows: Sequence[tuple[int, ...]], pad_id: int, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        at = 0 if side == "right" else length - len(row)
        ids[i, at : at + len(row)] = torch.tensor(row)
        mask[i, at : at + len(row)] = 1
    return ids, mask


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


def greedy(
    logits: Callable[[Sequence[Text]], list[Tensor]],
    texts: Sequence[Text],
    new: int,
    *,
    done: Callable[[int, list[int]], bool],
    limit: int | None = None,
) -> list[list[int]]:
    """The tokens that greedy decoding adds to each text, every one from a teacher-forced pass over all before it.

    Slower than a model's own generation, which keeps what it has read; right whatever gives the logits.

    Args:
        logits: texts to the logits ``[labels, vocabulary]`` of each.
        texts: all of their ``ids`` have been said already, the answer from ``start`` on.
        new: how many tokens to add, at most.
        done: by a text's place and what was added to it so far, whether that is all.
        limit: the most ids of a text.
    """
    added: list[list[int]] = [[] for _ in texts]
    unfinished = list(range(len(texts)))
    for _ in range(new):
        said = {i: (*texts[i].ids, *added[i]) for i in unfinished}
        unfinished = [i for i, ids in said.items() if limit is None or len(ids) < limit]
        asked = [replace(texts[i], ids=(*said[i], 0)) for i in unfinished]  # the last one is not read
        for i, rows in zip(unfinished, logits(asked) if asked else (), strict=True):
            added[i].append(int(rows[-1].argmax()))
        unfinished = [i for i in unfinished if not done(i, added[i])]
    return added
