"""Text sampled from a decoder itself, used as running text that an edit must leave unchanged.

An edit that only has to preserve short answers can ruin running text (docs/log.md). A decoder's own samples are running
text that is available for every decoder, in its own language and style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emendo._storage import digest, new_file, read_json, write_json
from emendo.errors import TrainingError
from emendo.models._forward import contiguous_projection
from emendo.models.lm import LM
from emendo.models.offloading import is_offloaded

PASSAGE_TOKENS = 32
PASSAGES_PER_BATCH = 64
"""Passages sampled at once. Fixed, so that the first passages do not depend on how many are requested."""


def own_passages(lm: LM, count: int, folder: Path | None = None) -> list[str]:
    """The first ``count`` passages that a decoder writes after its begin token.

    They are sampled at temperature 1 from the full distribution with fixed seeds. The caller's random state is left
    unchanged.

    Args:
        lm: the decoder.
        count: how many passages.
        folder: where to cache them; None caches nothing.

    Raises:
        TrainingError: the tokenizer has no begin or end token to start from, or weights of the model are offloaded,
            which would be read again for each token.
    """
    file = None if folder is None else folder / f"{_cache_key(lm)}.json"
    passages: list[str] = read_json(file)["passages"] if file is not None and file.exists() else []
    if len(passages) < count:
        passages = _write_passages(lm, count)
        if file is not None:
            with new_file(file) as temporary:
                write_json(temporary, {"model": lm.name, "passages": passages})
    return passages[:count]


def _cache_key(lm: LM) -> str:
    return digest([lm.fingerprint, lm.dtype, len(lm.tokenizer), PASSAGE_TOKENS, PASSAGES_PER_BATCH])


def _write_passages(lm: LM, count: int) -> list[str]:
    tokenizer = lm.tokenizer
    if is_offloaded(lm.model):
        raise TrainingError(
            f"Parts of {lm.name} would be read again for each token that it writes, which takes too long: give plain "
            "text to preserve with --text FILE, or none with --text-examples 0."
        )
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if first is None:
        raise TrainingError(
            f"The tokenizer of {lm.name} has no begin or end token, so the model cannot start a text of its own; "
            "give plain text to preserve with --text FILE."
        )
    start = torch.full((PASSAGES_PER_BATCH, 1), first, device=lm.device)
    inputs = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    special = list(tokenizer.all_special_ids)
    tokens = PASSAGE_TOKENS if lm.context is None else min(PASSAGE_TOKENS, lm.context - 1)
    passages: list[str] = []
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        for seed in range(math.ceil(count / PASSAGES_PER_BATCH)):
            torch.manual_seed(seed)
            rows = sample_tokens(lm, inputs, tokens, suppress_tokens=special)
            passages += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return passages


@torch.no_grad()
def sample_tokens(lm: LM, inputs: Mapping[str, Any], tokens: int, **options: Any) -> Tensor:
    """Sample exactly ``tokens`` more tokens for each row, at temperature 1 from the full distribution.

    Args:
        lm: the decoder.
        inputs: ``input_ids`` and ``attention_mask``, ``[rows, length]``, padded on the left.
        tokens: number of new tokens.
        options: further options of ``generate``, such as ``suppress_tokens``.

    Returns:
        Token ids, ``[rows, tokens]``.
    """
    with contiguous_projection(lm.model):
        out = lm.model.generate(
            **inputs,
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
            **options,
        )
    rows: Tensor = out[:, inputs["input_ids"].shape[1] :]
    return rows
