"""Greedy decoding from teacher-forced logits; texts and their batches are tested with what makes them (data)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emendo.models.text import Text, greedy


def counting(texts: Sequence[Text]) -> list[Tensor]:
    """After token n comes n + 1 modulo 10 at every label position; the last id must not be read."""
    return [torch.eye(10)[[(i + 1) % 10 for i in text.ids[text.start - 1 : -1]]] for text in texts]


def never(place: int, new: list[int]) -> bool:
    return False


def test_greedy_goes_on_until_an_end_or_the_limit() -> None:
    texts = [Text((3,), 1), Text((5, 7), 1, source=(1, 2)), Text((0, 0, 0, 2), 2)]
    assert greedy(counting, texts, 0, done=never) == [[], [], []]
    assert greedy(counting, texts, 4, done=never) == [[4, 5, 6, 7], [8, 9, 0, 1], [3, 4, 5, 6]]
    assert greedy(counting, texts, 4, done=lambda i, new: new[-1] in (9, 4)) == [[4], [8, 9], [3, 4]]
    assert greedy(counting, texts, 4, done=never, limit=4) == [[4, 5, 6], [8, 9], []]
    assert greedy(counting, [], 4, done=never) == []


def test_greedy_asks_for_what_is_not_done_and_leaves_the_answer_where_it_begins() -> None:
    asked: list[list[tuple[int, int]]] = []

    def logits(texts: Sequence[Text]) -> list[Tensor]:
        asked.append([(text.start, len(text.labels)) for text in texts])
        return counting(texts)

    greedy(logits, [Text((1, 2, 8), 2), Text((5,), 1)], 3, done=lambda i, new: i == 0 and new == [9])
    assert asked == [[(2, 2), (1, 1)], [(1, 2)], [(1, 3)]]  # (start, labels)
