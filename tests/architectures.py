"""Tiny random models of every architecture, and where their matrices are (the answer that `find_sites` has to find).

Everything is built from configs and seeds; nothing is downloaded, and nothing is built at import.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from emendo.models.sites import Kind

VOCABULARY, WIDTH, INNER, DEPTH, HEADS, CONTEXT = 320, 32, 48, 4, 4, 96
CLASSES = ("Refuted", "Supported", "Unknown")
PAD, END, BEGIN = "<|pad|>", "<|end|>", "<|begin|>"


@dataclass(frozen=True, slots=True)
class Blocks:
    """A stack of four alike blocks: its name, and the names of the matrices in each block, separated by spaces."""

    stack: str
    mlp: str
    attention: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a tiny model is built from, and the right answers about it."""

    blocks: tuple[Blocks, ...]
    config: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "causal"
    type: str = ""  # in the config, where it is not the architecture's own name
    special: tuple[str, ...] = (END, BEGIN)  # tokens by number
    template: str = "$A"  # how its tokenizer dresses a text
    transposed: bool = False  # Conv1D
    edited: int = 3  # blocks of each stack, by default

    def sites(self, which: str, blocks: range) -> list[str]:
        """Dotted names of the "mlp" or "attention" matrices in some blocks of each stack."""
        return [
            f"{b.stack}.{i}.{part}" for b in self.blocks for i in blocks for part in getattr(b, which).split()
        ]


_BERT = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_GPT = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_inner": INNER, "n_positions": CONTEXT}
_GPT_NEO = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_layers": DEPTH,
    "num_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 8,
}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": DEPTH, "num_heads": HEADS}
_BART = {
    "d_model": WIDTH,
    **{f"{side}_layers": DEPTH for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": INNER for side in ("encoder", "decoder")},
    "max_position_embeddings": CONTEXT,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
}
_DISTILBERT = {
    "dim": WIDTH,
    "hidden_dim": INNER,
    "n_layers": DEPTH,
    "n_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
_FAIRSEQ = "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj"


def _decoder(stack: str, mlp: str, attention: str, config: dict[str, Any], **rest: Any) -> Architecture:
    return Architecture((Blocks(stack, mlp, attention),), config, **rest)


def _llama(**more: Any) -> Architecture:
    return _decoder(
        "model.layers",
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
        {**_LLAMA, **more},
    )


def _t5(*inner: str, **more: Any) -> Architecture:
    mlp = [" ".join(f"layer.{i}.DenseReluDense.{name}" for name in (*inner, "wo")) for i in (1, 2)]
    own, across = (
        " ".join(f"layer.{part}.{x}" for x in "qkvo") for part in ("0.SelfAttention", "1.EncDecAttention")
    )
    return Architecture(
        (Blocks("encoder.block", mlp[0], own), Blocks("decoder.block", mlp[1], f"{own} {across}")),
        {**_T5, "decoder_start_token_id": 0, **more},
        kind="seq2seq",
        type="t5",
        special=(PAD, END),
        template=f"$A {END}",
        edited=2,
    )


def _classifier(stack: str, mlp: str, attention: str, config: dict[str, Any], **rest: Any) -> Architecture:
    return _decoder(
        stack,
        mlp,
        attention,
        {**config, "id2label": dict(enumerate(CLASSES))},
        kind="classifier",
        template=f"{BEGIN} $A {END}",
        **rest,
    )


_BERT_PARTS = (
    "intermediate.dense output.dense",
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama(tie_word_embeddings=True),
    "gpt2": _decoder(
        "transformer.h", "mlp.c_fc mlp.c_proj", "attn.c_attn attn.c_proj", _GPT, transposed=True
    ),
    "gpt_neo": _decoder(
        "transformer.h",
        "mlp.c_fc mlp.c_proj",
        " ".join(f"attn.attention.{name}_proj" for name in ("k", "v", "q", "out")),
        _GPT_NEO,
    ),
    "gpt_neox": _decoder(
        "gpt_neox.layers",
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "attention.query_key_value attention.dense",
        _LLAMA,
    ),
    "gptj": _decoder(
        "transformer.h",
        "mlp.fc_in mlp.fc_out",
        "attn.k_proj attn.v_proj attn.q_proj attn.out_proj",
        {**_GPT, "rotary_dim": 4},
    ),
    "opt": _decoder(
        "model.decoder.layers",
        "fc1 fc2",
        _FAIRSEQ,
        {**_LLAMA, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
    ),
    "mistral": _llama(sliding_window=8),
    "qwen2": _llama(),
    "qwen3": _llama(head_dim=8),
    "gemma": _llama(head_dim=8),
    "gemma2": _llama(head_dim=8, sliding_window=8),
    "gemma3_text": _llama(
        head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "phi": _decoder(
        "model.layers",
        "mlp.fc1 mlp.fc2",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense",
        _LLAMA,
    ),
    "t5": _t5("wi"),
    "t5-gated": _t5("wi_0", "wi_1", feed_forward_proj="gated-gelu", tie_word_embeddings=False),  # v1.1
    "bart": Architecture(
        (
            Blocks("model.encoder.layers", "fc1 fc2", _FAIRSEQ),
            Blocks(
                "model.decoder.layers",
                "fc1 fc2",
                f"{_FAIRSEQ} {_FAIRSEQ.replace('self_attn', 'encoder_attn')}",
            ),
        ),
        _BART,
        kind="seq2seq",
        special=(BEGIN, PAD, END),
        template=f"{BEGIN} $A {END}",
        edited=2,
    ),
    "bert": _classifier("bert.encoder.layer", *_BERT_PARTS, _BERT, special=(PAD, BEGIN, END)),
    "roberta": _classifier(
        "roberta.encoder.layer",
        *_BERT_PARTS,
        {
            **_BERT,
            "max_position_embeddings": CONTEXT + 2,
        },  # positions count from behind the padding's index, 1
        special=(BEGIN, PAD, END),
    ),
    "distilbert": _classifier(
        "distilbert.transformer.layer",
        "ffn.lin1 ffn.lin2",
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
        _DISTILBERT,
        special=(PAD, BEGIN, END),
    ),
}

ALIKE = set("gpt_neox gptj mistral qwen2 qwen3 gemma gemma3_text phi roberta distilbert".split())
"""Architectures built like another one; their tests are in the slow suite."""

VARIANTS = {"gpt_neo", "gemma2", "t5-gated"}
"""Architectures that differ from another one inside their blocks alone, which `tests/models` is about."""

_AUTO = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}


def of_kind(*kinds: Kind) -> list[str]:
    """Names of the architectures of some kinds of model."""
    return [name for name, known in ARCHITECTURES.items() if known.kind in kinds]


def build_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """A tiny random model, frozen and in eval mode, as `emendo.models.loading.load` hands it over.

    The weights are larger than at a usual start, so that every block matters to the output. Each call gives a copy:
    building a model takes three times as long as copying it.

    Args:
        kind: an architecture.
        dtype: of the weights.
        seed: of the weights.
        config: settings of the model's own config that differ.
    """
    key = repr((kind, dtype, seed, config))
    if key not in _BUILT:
        _BUILT[key] = _build_model(kind, dtype, seed, config)
    model = deepcopy(_BUILT[key])
    ORIGINALS[model] = _BUILT[key]
    return model


_BUILT: dict[str, Any] = {}
ORIGINALS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""The model of which another one is a copy."""


def _build_model(kind: str, dtype: torch.dtype, seed: int, config: dict[str, Any]) -> Any:
    known = ARCHITECTURES[kind]
    number = {token: i for i, token in enumerate(known.special)}
    settings = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "bos_token_id": number.get(BEGIN),
        "eos_token_id": number[END],
        "pad_token_id": number.get(PAD, number[END]),
        **known.config,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _AUTO[known.kind].from_config(AutoConfig.for_model(known.type or kind, **settings))
        for name, tensor in model.named_parameters():
            if name.endswith("bias") and tensor.dim() == 1:  # zero at a usual start
                nn.init.normal_(tensor, std=0.1)
    return model.to(dtype).eval().requires_grad_(False)
