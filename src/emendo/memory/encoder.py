"""Learned keys of prompts: a vector of the subject and one of the relation, from the hidden state in a middle block.

Two prompts about one fact have similar keys in both parts, two relations of one subject in the first part only, and one
relation of two subjects in the second only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emendo.models._forward import model_inputs
from emendo.models.lm import LM
from emendo.models.sites import find_stacks
from emendo.models.text import collate, length_buckets
from emendo.models.trunk import input_of

_TOKENS = 2048  # padded tokens of one pass


class KeyEncoder(nn.Module):
    """Attention pooling and a small residual network, for each part of the key.

    Args:
        width: of the hidden state.
        block: index of the block that it enters.
        size: numbers of each part.
        heads: of the attention pooling.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, block: int, size: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.width, self.block, self.size, self.heads = width, block, size, heads
        self.parts = nn.ModuleList([_Part(width, size, heads) for _ in range(2)])
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Keys ``[texts, 2, size]`` of unit length in each part.

        Args:
            hidden: ``[texts, tokens, width]``.
            mask: ``[texts, tokens]``, true for the tokens of the prompt; the first token never counts, since its
                hidden state says nothing about the text.
        """
        mask = mask.clone()
        mask[:, 0] &= ~mask[:, 1:].any(1) if mask.shape[1] > 1 else mask[:, 0]
        standard = (hidden.float() - self.mean) / self.std
        return torch.stack([F.normalize(part(standard, mask), dim=-1) for part in self.parts], 1)

    @torch.no_grad()
    def keys(self, lm: LM, prompts: Sequence[str]) -> Tensor:
        """Keys ``[prompts, 2, size]`` of prompts as they stand, without a chat template."""
        found: dict[int, Tensor] = {}
        for part, hidden, mask in hidden_states(lm, prompts, self.block):
            found |= zip(part, self(hidden.cpu(), mask.cpu()), strict=True)
        return torch.stack([found[i] for i in range(len(prompts))])


class _Part(nn.Module):
    def __init__(self, width: int, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value = nn.Linear(width, heads), nn.Linear(width, size)
        self.line = nn.Linear(size, size)
        self.curve = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        weight = self.query(hidden).masked_fill(~mask[..., None], -1e9).softmax(1)
        value = self.value(hidden).unflatten(-1, (self.heads, -1))
        pooled: Tensor = torch.einsum("bth,bthe->bhe", weight, value).flatten(1)
        found: Tensor = self.line(pooled) + self.curve(pooled)
        return found


@torch.no_grad()
def hidden_states(lm: LM, prompts: Sequence[str], block: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The hidden state that enters a block, for batches of prompts of similar length.

    Yields:
        Places of the prompts of a batch, hidden states ``[texts, tokens, width]``, and the mask ``[texts, tokens]``.
    """
    texts = lm.reading(chat=False).prompt_texts(list(prompts))
    stack = find_stacks(lm.model)[0]
    module = lm.model.get_submodule(stack.name)[block]
    for part in length_buckets(range(len(texts)), lambda i: texts[i].size, _TOKENS):
        batch = collate([texts[i] for i in part])
        hidden = input_of(module, partial(lm.model, **model_inputs(lm.model, batch)))
        yield part, hidden, batch.trunk_mask.bool()
