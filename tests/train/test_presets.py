"""The presets: their matrices in models of the real sizes, on the meta device, and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from emendo.cli._settings import RunSettings
from emendo.editors import editor_class
from emendo.errors import ModelError, RequestError
from emendo.models.sites import find_sites
from emendo.train import TrainConfig
from emendo.train.presets import METHODS, MODELS, PRESETS, preset_options


def t5(width: int, inner: int, layers: int, heads: int, form: str = "gated-gelu") -> Any:
    return transformers.T5Config(
        d_model=width, d_ff=inner, num_layers=layers, num_heads=heads, feed_forward_proj=form
    )


def gpt2(width: int, layers: int) -> Any:
    return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64)


CONFIGS = {
    "bert-base": transformers.BertConfig(num_labels=1),
    "bart-base": transformers.BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072
    ),
    "distilgpt2": gpt2(768, 6),
    "gpt2": gpt2(768, 12),
    "gpt2-medium": gpt2(1024, 24),
    "gpt2-large": gpt2(1280, 36),
    "gpt2-xl": gpt2(1600, 48),
    "gpt-neo-2.7b": transformers.GPTNeoConfig(
        hidden_size=2560, num_layers=32, num_heads=20, attention_types=[[["global", "local"], 16]]
    ),
    "gpt-j-6b": transformers.GPTJConfig(),
    "t5-small": t5(512, 1024, 8, 6),
    "t5-large": t5(1024, 4096, 24, 16, "relu"),
    "t5-xl": t5(2048, 5120, 24, 32),
    "t5-xxl": t5(4096, 10240, 24, 64),
}
"""The sizes of the published checkpoints."""

MATRICES = {  # count; blocks of each stack; (d_in, d_out); the first name, and the end of the last
    "bert-base": (
        6,
        {9, 10, 11},
        {(768, 3072), (3072, 768)},
        "bert.encoder.layer.9.intermediate.dense",
        "11.output.dense",
    ),
    "bart-base": (
        8,
        {4, 5},
        {(768, 3072), (3072, 768)},
        "model.encoder.layers.4.fc1",
        "model.decoder.layers.5.fc2",
    ),
    "distilgpt2": (6, {3, 4, 5}, {(768, 3072), (3072, 768)}, "transformer.h.3.mlp.c_fc", "h.5.mlp.c_proj"),
    "gpt2": (6, {9, 10, 11}, {(768, 3072), (3072, 768)}, "transformer.h.9.mlp.c_fc", "h.11.mlp.c_proj"),
    "gpt2-medium": (
        6,
        {21, 22, 23},
        {(1024, 4096), (4096, 1024)},
        "transformer.h.21.mlp.c_fc",
        "h.23.mlp.c_proj",
    ),
    "gpt2-large": (
        6,
        {33, 34, 35},
        {(1280, 5120), (5120, 1280)},
        "transformer.h.33.mlp.c_fc",
        "h.35.mlp.c_proj",
    ),
    "gpt2-xl": (
        6,
        {45, 46, 47},
        {(1600, 6400), (6400, 1600)},
        "transformer.h.45.mlp.c_fc",
        "h.47.mlp.c_proj",
    ),
    "gpt-neo-2.7b": (
        6,
        {29, 30, 31},
        {(2560, 10240), (10240, 2560)},
        "transformer.h.29.mlp.c_fc",
        "h.31.mlp.c_proj",
    ),
    "gpt-j-6b": (
        6,
        {25, 26, 27},
        {(4096, 16384), (16384, 4096)},
        "transformer.h.25.mlp.fc_in",
        "h.27.mlp.fc_out",
    ),
    "t5-small": (
        8,
        {6, 7},
        {(512, 1024), (1024, 512)},
        "encoder.block.6.layer.1.DenseReluDense.wi_0",
        "decoder.block.7.layer.2.DenseReluDense.wo",
    ),
    "t5-large": (
        8,
        {22, 23},
        {(1024, 4096), (4096, 1024)},
        "encoder.block.22.layer.1.DenseReluDense.wi",
        "decoder.block.23.layer.2.DenseReluDense.wo",
    ),
    "t5-xl": (
        8,
        {22, 23},
        {(2048, 5120), (5120, 2048)},
        "encoder.block.22.layer.1.DenseReluDense.wi_0",
        "decoder.block.23.layer.2.DenseReluDense.wo",
    ),
    "t5-xxl": (
        8,
        {22, 23},
        {(4096, 10240), (10240, 4096)},
        "encoder.block.22.layer.1.DenseReluDense.wi_0",
        "decoder.block.23.layer.2.DenseReluDense.wo",
    ),
}

PARAMETERS = {
    "bert-base": 59_089_926,
    "distilgpt2": 59_089_926,
    "bart-base": 59_120_648,
    "gpt-neo-2.7b": 196_966_406,
    "gpt-j-6b": 315_146_246,
    "t5-large": 78_827_528,
    "t5-xl": 110_358_536,
    "t5-xxl": 220_717_064,
}
"""Of the official MEND editors: 2 shapes x 2 blocks x (2 d r + d + 2 modes d), and alpha; r = 1920."""


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, MODELS[name].architecture)(CONFIGS[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_matrices_of_a_model(name: str) -> None:
    model = on_meta(name)
    found = find_sites(model, MODELS[name].sites)
    count, blocks, shapes, first, last = MATRICES[name]
    assert sorted(site.name for site in found) == sorted(MODELS[name].sites)
    assert len(found) == count
    assert {site.block for site in found} == blocks
    assert {site.shape for site in found} == shapes
    assert found[0].name == first and found[-1].name.endswith(last)
    parameters = dict(model.named_parameters())
    assert all(f"{site.name}.weight" in parameters for site in found)
    depth = {stack: len(model.get_submodule(stack)) for stack in {site.stack for site in found}}
    assert all(site.block >= depth[site.stack] - len(blocks) for site in found)  # the last blocks


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_size_of_the_editor(name: str) -> None:
    settings = RunSettings.from_options({"model": "-", "data": "-", **preset_options(f"mend/{name}")})
    kind = editor_class("mend")
    with torch.device("meta"):
        editor = kind(find_sites(on_meta(name), settings.sites), kind.Config(**settings.editor_settings))
    assert sum(parameter.numel() for parameter in editor.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_is_one_of_the_method(name: str) -> None:
    options = preset_options(name)
    settings = RunSettings.from_options({"model": "-", "data": "-", **options})
    method, _, model = name.partition("/")
    assert settings.editor == method
    assert settings.editor_settings.items() >= METHODS[method].settings.items()
    assert settings.sites == list(MODELS[model].sites)
    config = settings.config
    assert isinstance(config, TrainConfig)
    assert (config.batch, config.c_edit, config.prompt_share, config.clip) == (10, 0.1, 0, 100)
    assert config.near + config.sibling + config.unrelated + config.text == 1
    assert (config.text == 1) == (MODELS[model].task == "generation")


def test_a_pattern_without_a_matrix_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"No weight matrix matches \['transformer\.h\.9\.mlp\.c_fc'"):
        find_sites(on_meta("distilgpt2"), ("transformer.h.5.mlp.c_fc", *MODELS["gpt2"].sites))


def test_an_unknown_preset() -> None:
    with pytest.raises(RequestError, match="There is no preset 'enn/gpt-j-6b'; there are: mend/bert-base"):
        preset_options("enn/gpt-j-6b")


def test_the_page_lists_the_matrices() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "paper-models.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert list(rows)[: len(MODELS)] == list(MODELS)
    for name, model in MODELS.items():
        assert ", ".join(f"`{pattern}`" for pattern in model.matrices) in rows[name]
        assert model.checkpoint is None or f"`{model.checkpoint}`" in rows[name]
        assert model.enn == ("| yes |" in rows[name])
