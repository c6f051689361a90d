"""The training loop for the models of :mod:`reproduction.mend_paper.zoo`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from emendo.progress import Progress

_IGNORED = -100  # transformers leaves these labels out of its losses
_WARM_UP = 0.05  # share of the steps in which the learning rate rises
_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """Input token ids and the answer: token ids, or the number of a class."""

    source: tuple[int, ...]
    label: tuple[int, ...]


def encoder(
    model: Any, tokenizer: Any, classes: Sequence[str]
) -> Callable[[Sequence[tuple[str, str]]], list[Example]]:
    """From texts and their answers (texts too, or the names of classes) to examples; a text is tokenised once."""
    seen: dict[str, tuple[int, ...]] = {}

    def ids(text: str) -> tuple[int, ...]:
        if text not in seen:
            seen[text] = tuple(tokenizer(text)["input_ids"])
        return seen[text]

    def label(text: str) -> tuple[int, ...]:
        return ids(text) if model.config.is_encoder_decoder else (classes.index(text),)

    return lambda pairs: [Example(ids(source), label(answer)) for source, answer in pairs]


def train(
    model: Any,
    draw: Callable[[Random], list[Example]],
    epochs: int,
    rate: float,
    size: int,
    progress: Progress,
    seed: int,
) -> None:
    """Train all weights of a model with AdamW and a cosine schedule, on examples that are drawn again each epoch."""
    random = Random(seed)
    steps = epochs * math.ceil(len(draw(Random(seed))) / size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    model.train()
    step = 0
    for _ in range(epochs):
        batches = [list(batch) for batch in _by_length(draw(random), size, random)]
        random.shuffle(batches)
        for batch in batches:
            inputs, labels = _tensors(model, batch)
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            progress.update("training", step, steps, {"loss": float(loss.detach())})
    model.eval()


@torch.no_grad()
def accuracy(model: Any, examples: Sequence[Example], size: int = 128) -> float:
    """The share of examples whose answer is the argmax at every token, teacher forced."""
    hits = 0
    for batch in _by_length(examples, size):
        inputs, labels = _tensors(model, batch)
        found = model(**inputs, labels=labels).logits.argmax(-1)
        hits += int(((found == labels) | (labels == _IGNORED)).reshape(len(batch), -1).all(-1).sum())
    return hits / len(examples)


def _share(step: int, steps: int) -> float:
    """The learning rate as a share of its highest value."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _by_length(
    examples: Sequence[Example], size: int, random: Random | None = None
) -> Iterator[Sequence[Example]]:
    """Batches of examples of similar length, shuffled among equal lengths."""
    order = list(examples)
    if random:
        random.shuffle(order)
    order.sort(key=lambda example: len(example.source))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _tensors(model: Any, batch: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs ``[examples, tokens]`` and labels ``[examples, tokens]``, or ``[examples]`` for a classifier."""
    source = _pad([example.source for example in batch], model.config.pad_token_id)
    mask = _pad([(1,) * len(example.source) for example in batch], 0)
    labels = _pad([example.label for example in batch], _IGNORED)
    if not model.config.is_encoder_decoder:
        labels = labels[:, 0]
    return {"input_ids": source, "attention_mask": mask}, labels


def _pad(rows: Sequence[tuple[int, ...]], filler: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])
