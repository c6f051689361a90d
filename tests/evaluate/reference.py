"""The slow, obvious way to measure an edit: dense weights, one record, one prompt, one token at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.tokenization import encode


@torch.no_grad()
def edited(lm: LM, deltas: Mapping[str, LowRank]) -> Any:
    """A copy of the model with the changes added to its weights."""
    model = copy.deepcopy(lm.model)
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        dense = delta.dense()
        weight += dense if weight.shape == dense.shape else dense.T  # Conv1D; no site here is square
    return model


@torch.no_grad()
def forced(lm: LM, model: Any, prompt: str, answer: str) -> tuple[Tensor, list[int]]:
    """Logits at the answer's positions, and the answer's tokens."""
    text = encode(lm.tokenizer, [(prompt, answer)])[0]
    logits = model(torch.tensor([text.ids])).logits[0]
    return logits[text.start - 1 : len(text.ids) - 1], list(text.labels)


def greedy(lm: LM, model: Any, prompt: str, new_tokens: int) -> str:
    """Greedy decoding without a cache."""
    return continued(lm, model, list(lm.tokenizer(prompt)["input_ids"]), new_tokens)


@torch.no_grad()
def continued(lm: LM, model: Any, ids: list[int], new_tokens: int, shown: int = 0) -> str:
    """The text of the last ``shown`` tokens and of those that greedy decoding adds."""
    start = len(ids) - shown
    for _ in range(new_tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]
        if token == lm.tokenizer.eos_token_id:
            break
    text: str = lm.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text
