"""Tiny random models of the classes of the installed transformers, built from their config classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, WIDTH, INNER, DEPTH, HEADS, HEAD_WIDTH = 384, 64, 96, 4, 4, 16

_WIDTH = """hidden_size d_model n_embd emb_dim dim embedding_size input_embedding_size output_embedding_size
    dim_model_base attention_hidden_size word_embed_proj_dim out_hidden_size encoder_hidden_size hidden_size_global
    lru_width
    cross_attention_hidden_size adapter_input_size backbone_hidden_size true_hidden_size output_dim
    pooler_hidden_size vision_output_dim projector_output_dim audio_hidden_size embedding_dim mamba_d_ssm d_latents
    entity_emb_size decoder_hidden_size
    encoder_d_model audio_embed_dim hidden_dim""".split()
_INNER = """intermediate_size moe_intermediate_size encoder_ffn_dim decoder_ffn_dim shared_expert_intermediate_size d_ff
    ffn_dim ffn_hidden_size dff d_inner shared_experts_intermediate_size intermediate_size_mlp dim_ff mlp_dim
    shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size dense_intermediate_size n_inner
    feed_forward_size expert_intermediate_size moe_ffn_hidden_size speech_encoder_intermediate_size
    t2u_encoder_ffn_dim t2u_decoder_ffn_dim""".split()
_DEPTH = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers depth num_blocks speech_encoder_layers t2u_encoder_layers t2u_decoder_layers""".split()
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads attention_heads
    num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads""".split()
_KV_HEADS = """num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads
    num_global_key_value_heads""".split()
_HEAD_WIDTH = """head_dim d_kv d_head attention_head_dim dim_head kv_channels attention_head_size v_head_dim
    swa_head_dim qk_nope_head_dim global_head_dim swa_v_head_dim""".split()
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, WIDTH),
    **dict.fromkeys(_INNER, INNER),
    **dict.fromkeys(_DEPTH, DEPTH),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_KV_HEADS, 2),
    **dict.fromkeys(_HEAD_WIDTH, HEAD_WIDTH),
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size", "unpadded_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("vocab_size_per_layer_input", "audio_vocab_size", "entity_vocab_size", "t2u_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128
    ),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "num_experts_per_token", "moe_top_k"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 16),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "encoder_hash_byte_group_vocab": 64,
    **dict.fromkeys(
        ("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size", "attention_window_size"), 32),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    "index_head_dim": 16,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "num_codebooks": 2,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "tie_word_embeddings": True,
    "is_decoder": True,
}
_DECODER_ONLY = ("is_decoder",)
_NO_KV = {"num_key_value_heads": HEADS}
_COMPASS = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_WIDTH,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
EXTRA: dict[str, dict[str, Any]] = {
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "dbrx": {
        "tie_word_embeddings": False,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    },
    "dots3_note": {
        "text_config": {"layer_types": ["indexed_attention"] * DEPTH},
        "vision_config": {"mlp_layer_types": ["dense"] * DEPTH},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "dots1": {"num_experts_per_tok": 2, "n_shared_experts": 1},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 32},
    "lilt": {"hidden_size": 96},
    "mobilebert": {"intra_bottleneck_size": WIDTH},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "esmc": _NO_KV,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "ministral": {"head_dim": HEAD_WIDTH},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2},
    "nemotron_h": {"n_groups": 2, "mamba_n_groups": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "mistral4": {"head_dim": 8},
    "zamba": {
        "num_hidden_layers": 8,
        "layers_block_type": None,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 54,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings of single model types, where the general ones do not fit together."""


def tiny_config(kind: str, model_type: str) -> PreTrainedConfig:
    """The type's config with small sizes, also in its parts (text, vision, audio)."""
    cls = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = cls(**_settings(cls(), kind, EXTRA.get(model_type, {})))
    if kind == "classifier":
        config.num_labels = 3
    return config


def _settings(default: PreTrainedConfig, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    keys = {*vars(default), *(default.attribute_map or {})}
    for key in sorted(keys):
        if key in (default.attribute_map or {}) and default.attribute_map[key] in SIZES:
            continue
        try:
            value = getattr(default, key, None)
        except Exception:  # noqa: BLE001 - a setting that differs between layers
            value = 0
        if isinstance(value, PreTrainedConfig):
            settings[key] = type(value)(**_settings(value, kind, extra.get(key, {})))
        elif key in SIZES and not isinstance(value, list | tuple | dict):
            if key == "is_decoder" and kind != "decoder":
                continue
            if value is None and key in (*_HEAD_WIDTH, "q_lora_rank"):
                continue
            if key == "num_key_value_heads" and "kv_lora_rank" in vars(default):
                settings[key] = HEADS
                continue
            if key == "head_dim" and value == getattr(default, "qk_rope_head_dim", None):  # latent attention
                settings[key] = SIZES["qk_rope_head_dim"]
                continue
            settings[key] = SIZES[key]
        elif (
            key.endswith(("_token_id", "_token_index"))
            and isinstance(value, int)
            and not isinstance(value, bool)
        ):
            settings[key] = 330 + sum(map(ord, key)) % 50
    settings |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if kind == "encoder-decoder" or getattr(default, "is_encoder_decoder", False):
        settings["decoder_start_token_id"] = 0
    return {
        **settings,
        **{k: v for k, v in extra.items() if not isinstance(settings.get(k), PreTrainedConfig)},
    }


def tiny_model(kind: str, model_type: str, name: str) -> Any:
    """A tiny random model of a class, frozen and in eval mode."""
    torch.manual_seed(0)
    config, cls = tiny_config(kind, model_type), getattr(transformers, name)
    if not isinstance(config, cls.config_class):  # the class is that of the text part alone
        config = next(c for c in vars(config).values() if isinstance(c, cls.config_class))
    model = cls(config)
    for tensor in model.parameters():
        if not tensor.any() or not tensor.isfinite().all() or tensor.abs().max() > 1e3:
            torch.nn.init.normal_(
                tensor, std=0.1
            )  # biases start at zero; some classes leave weights uninitialised
    return model.float().eval().requires_grad_(False)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<begin>", "<pad>", "<end>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
