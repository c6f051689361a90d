"""What the tests run on: tiny random decoders, a tokenizer made in code, made-up records.

Everything is built from configs and seeds; nothing is downloaded, and nothing is built at import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emendo.data import Probe, Record
from emendo.models import LM

VOCABULARY, WIDTH, INNER, DEPTH, HEADS, CONTEXT = 320, 32, 48, 4, 4, 96
END, BEGIN = "<|end|>", "<|begin|>"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of four blocks, and where its matrices are (the answer that `find_sites` has to find)."""

    stack: str
    mlp: tuple[str, ...]
    attention: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False  # Conv1D


_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GPT = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_inner": INNER, "n_positions": CONTEXT}
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("model.layers", _GATED, _QKVO, {**_LLAMA, "tie_word_embeddings": True}),
    "gpt2": Architecture(
        "transformer.h", ("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj"), _GPT, transposed=True
    ),
    "gpt_neo": Architecture(
        "transformer.h",
        ("mlp.c_fc", "mlp.c_proj"),
        tuple(f"attn.attention.{name}_proj" for name in ("k", "v", "q", "out")),
        {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_layers": DEPTH,
            "num_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
        },
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("attention.query_key_value", "attention.dense"),
        _LLAMA,
    ),
    "gptj": Architecture(
        "transformer.h",
        ("mlp.fc_in", "mlp.fc_out"),
        tuple(f"attn.{name}_proj" for name in ("k", "v", "q", "out")),
        {**_GPT, "rotary_dim": 4},
    ),
    "opt": Architecture(
        "model.decoder.layers",
        ("fc1", "fc2"),
        tuple(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")),
        {**_LLAMA, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
    ),
    "mistral": Architecture("model.layers", _GATED, _QKVO, {**_LLAMA, "sliding_window": 8}),
    "qwen2": Architecture("model.layers", _GATED, _QKVO, _LLAMA),
    "qwen3": Architecture("model.layers", _GATED, _QKVO, {**_LLAMA, "head_dim": 8}),
    "gemma": Architecture("model.layers", _GATED, _QKVO, {**_LLAMA, "head_dim": 8}),
    "gemma2": Architecture("model.layers", _GATED, _QKVO, {**_LLAMA, "head_dim": 8, "sliding_window": 8}),
    "gemma3_text": Architecture(
        "model.layers",
        _GATED,
        _QKVO,
        {
            **_LLAMA,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi": Architecture(
        "model.layers",
        ("mlp.fc1", "mlp.fc2"),
        tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")),
        _LLAMA,
    ),
}


def build_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random decoder, frozen and in eval mode, as `emendo.models.load` hands it over.

    The weights are larger than at a usual start, so that every block matters to the output.
    """
    config = AutoConfig.for_model(
        kind,
        **ARCHITECTURES[kind].config,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):  # zero at a usual start
                nn.init.normal_(tensor, std=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def build_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens; with `bos` it puts a token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"{text} {record.target}" for record in records(32) for text in (record.prompt, *record.paraphrases)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_lm(kind: str, dtype: torch.dtype = torch.float32, *, bos: bool = False, seed: int = 0) -> LM:
    """A tiny model with its tokenizer."""
    return LM(build_model(kind, dtype, seed), build_tokenizer(bos=bos), f"tiny-{kind}")


_SYLLABLES = ("ba", "de", "fo", "gu", "ka", "li", "mo", "nu", "pa", "ri", "so", "tu")
_TARGETS = ("Paris", "Rome", "Old Town", "Oslo", "Lima", "New Port", "Cairo")


def _name(index: int) -> str:
    first, rest = index % 12, index // 12
    return (_SYLLABLES[first] + _SYLLABLES[(rest + 5 * first) % 12] + _SYLLABLES[rest // 12 % 12]).title()


def records(n: int) -> list[Record]:
    """Made-up facts, each about a subject of its own; always the same ones."""
    made = []
    for i in range(n):
        name, target, old = _name(i), _TARGETS[i % 7], _TARGETS[(i + 3) % 7]
        near = [Probe(f"The capital of {_name(1700 + i + k)} is", _TARGETS[(i + k) % 7]) for k in (1, 2)]
        made.append(
            Record(
                prompt=f"The capital of {name} is",
                target=target,
                subject=name,
                relation="capital",
                id=f"made-{i}",
                paraphrases=(f"{name}'s capital is", f"The main city of {name} is called"),
                neighbours=tuple(near),
                unrelated=(
                    Probe("Water is made of hydrogen and", "oxygen"),
                    Probe("Two and two are", "four"),
                ),
                answer=old,
            )
        )
    return made


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fails unless the model leaves the block as it came in: bits, flags, gradients, hooks and modules."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        different = [key for key in before | after if before.get(key) != after.get(key)]
        assert not different, f"the model was changed: {different}"


def _state(model: nn.Module) -> dict[str, object]:
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        state[f"module {name}"] = (id(module), module.training, [len(kind) for kind in hooks])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy().tobytes()
        state[f"tensor {name}"] = (
            tensor.dtype,
            tensor.shape,
            tensor.requires_grad,
            tensor.grad is None,
            bits,
        )
    return state
