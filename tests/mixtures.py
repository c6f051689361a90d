"""Tiny random mixtures of fused experts, of transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cases import CONTEXT, DEPTH, INNER, VOCABULARY, WIDTH, build_tokenizer
from emendo.models.lm import LM

MIXTURES = ["mixtral", "gpt_oss"]  # the second has biases, transposed weights and a gate of its own
EXPERTS = 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Settings of the part of a tiny model that reads text."""
SIZES = {**TEXT, "num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 2}


def mixture(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **config))
        for tensor in model.parameters():
            if not tensor.any():
                nn.init.normal_(tensor, std=0.1)
    if dtype == torch.float64:  # which the fused kernels do not know
        model.set_experts_implementation("eager")
    return model.to(dtype).eval().requires_grad_(False)


def build_mixture(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> LM:
    """A mixture with its tokenizer, and each expert's matrices open for editing."""
    return LM(mixture(kind, dtype, **config), build_tokenizer(), f"tiny-{kind}")
