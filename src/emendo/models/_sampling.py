"""Text that a model writes by itself: what it is to be held to where no other text is given.

An edit that is only asked to keep short answers as they are may ruin running text (docs/log.md). A decoder's own
samples are running text that every decoder has, in its own language and of its own kind.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emendo._storage import new_file, read_json, write_json
from emendo.errors import TrainingError
from emendo.models.lm import LM

TOKENS = 32
"""Tokens of a passage."""
TOGETHER = 64
"""Passages written at once; they are the same whatever number is asked for."""


def own_passages(lm: LM, count: int, folder: Path | None = None) -> list[str]:
    """The first ``count`` passages that a decoder writes after nothing but its first token.

    Sampled at temperature 1 from the whole distribution, with a seed of their own; the generators of the caller stay
    where they are.

    Args:
        lm: the decoder.
        count: how many passages.
        folder: where they are kept, for the next time; None keeps nothing.

    Raises:
        TrainingError: the tokenizer names no token to begin with.
    """
    file = None if folder is None else folder / f"{_key(lm)}.json"
    found: list[str] = read_json(file)["passages"] if file is not None and file.exists() else []
    if len(found) < count:
        found = _written(lm, count)
        if file is not None:
            with new_file(file) as temporary:
                write_json(temporary, {"model": lm.name, "passages": found})
    return found[:count]


def _key(lm: LM) -> str:
    made_of = repr((lm.fingerprint, lm.dtype, len(lm.tokenizer), TOKENS, TOGETHER))
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _written(lm: LM, count: int) -> list[str]:
    tokenizer = lm.tokenizer
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if first is None:
        raise TrainingError(
            f"The tokenizer of {lm.name} names no token that a text begins with, so the model cannot write its own; "
            "give plain text to keep as it is with --text FILE."
        )
    start = torch.full((TOGETHER, 1), first, device=lm.device)
    begun = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    barred = list(tokenizer.all_special_ids)
    tokens = TOKENS if lm.context is None else min(TOKENS, lm.context - 1)
    found: list[str] = []
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        for seed in range(math.ceil(count / TOGETHER)):
            torch.manual_seed(seed)
            rows = sampled(lm, begun, tokens, suppress_tokens=barred)
            found += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return found


@torch.no_grad()
def sampled(lm: LM, begun: Mapping[str, Any], tokens: int, **barred: Any) -> Tensor:
    """Exactly so many more tokens for every row, sampled at temperature 1 from the whole distribution.

    Args:
        lm: the decoder.
        begun: ``input_ids`` and ``attention_mask``, ``[rows, length]``, padded on the left.
        tokens: how many to add.
        barred: what ``generate`` is told to leave out.

    Returns:
        Token ids, ``[rows, tokens]``.
    """
    out = lm.model.generate(
        **begun,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=True,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=lm.tokenizer.pad_token_id,
        **barred,
    )
    rows: Tensor = out[:, begun["input_ids"].shape[1] :]
    return rows
