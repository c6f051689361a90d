"""Finding weight matrices by structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from cases import ARCHITECTURES, DEPTH, INNER, WIDTH, build_model, unchanged
from emendo.errors import ModelError
from emendo.models import LM
from emendo.sites import Stack, all_sites, find_sites, find_stacks

KINDS = sorted(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_every_matrix_of_a_decoder(kind: str) -> None:
    model, known = build_model(kind), ARCHITECTURES[kind]
    assert find_stacks(model) == [Stack(known.stack, DEPTH)]
    names = {which: [site.name for site in find_sites(model, which)] for which in ("mlp", "attention", "all")}
    for which, parts in (("mlp", known.mlp), ("attention", known.attention)):
        expected = {f"{known.stack}.{block}.{part}" for block in (1, 2, 3) for part in parts}
        assert set(names[which]) == expected
        assert len(names[which]) == len(expected)
    assert set(names["all"]) == {*names["mlp"], *names["attention"]}
    order = [name for name, _ in model.named_modules()]
    assert names["all"] == sorted(names["all"], key=order.index)


@pytest.mark.parametrize("kind", KINDS)
def test_site_describes_its_matrix(kind: str) -> None:
    model, known = build_model(kind), ARCHITECTURES[kind]
    with unchanged(model):
        for site in find_sites(model, "all", last=2):
            weight, module = site.weight(model), site.module(model)
            assert weight.shape == (site.d_out, site.d_in)
            assert site.shape == (site.d_in, site.d_out)
            assert weight.data_ptr() == module.weight.data_ptr()  # type: ignore[union-attr, operator]
            assert site.transposed == known.transposed
            assert site.attention == any(site.name.endswith(part) for part in known.attention)
            assert site.name.startswith(f"{site.stack}.{site.block}.")
            x = torch.randn(3, site.d_in)
            torch.testing.assert_close(module(x), F.linear(x, weight, module.bias))  # type: ignore[arg-type]


def test_shapes_tell_input_from_output(tiny_llama: LM, tiny_gpt2: LM) -> None:
    shapes = {
        site.name.split(".")[-1]: site.shape for lm in (tiny_llama, tiny_gpt2) for site in all_sites(lm.model)
    }
    assert shapes["up_proj"] == (WIDTH, INNER)
    assert shapes["down_proj"] == (INNER, WIDTH)
    assert shapes["k_proj"] == (WIDTH, WIDTH // 2)  # two key heads for four query heads
    assert shapes["c_fc"] == (WIDTH, INNER)
    assert shapes["c_attn"] == (WIDTH, 3 * WIDTH)


@pytest.mark.parametrize(
    ("which", "options", "expected"),
    [
        ("*.mlp.down_proj", {}, ["0.mlp.down_proj", "1.mlp.down_proj", "2.mlp.down_proj", "3.mlp.down_proj"]),
        ("*.layers.[13].mlp.up_proj", {}, ["1.mlp.up_proj", "3.mlp.up_proj"]),
        (["*.mlp.up_proj", "*.o_proj"], {"last": 1}, ["3.self_attn.o_proj", "3.mlp.up_proj"]),
        ("*.down_proj", {"blocks": [0, -1]}, ["0.mlp.down_proj", "3.mlp.down_proj"]),
        ("*.down_proj", {"blocks": [2], "last": 1}, ["2.mlp.down_proj"]),
        ("*.down_proj", {"last": 9}, [f"{i}.mlp.down_proj" for i in range(4)]),
    ],
)
def test_patterns_and_blocks(
    tiny_llama: LM, which: Any, options: dict[str, Any], expected: list[str]
) -> None:
    names = [site.name for site in find_sites(tiny_llama.model, which, **options)]
    assert names == [f"model.layers.{name}" for name in expected]


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("*.no_such", {}, ["'*.no_such'", "model.layers.3.mlp.down_proj"]),
        ("*.layers.0.*", {"blocks": [3]}, ["'*.layers.0.*'", "blocks [3]", "model.layers.3.mlp.up_proj"]),
        ("mlp", {"blocks": [1, 4]}, ["no block 4", "0 to 3"]),
        ("mlp", {"blocks": [-5]}, ["no block -5"]),
        ("mlp", {"last": 0}, ["last=0", "at least 1"]),
    ],
)
def test_what_is_not_there_is_named(
    tiny_llama: LM, which: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as error:
        find_sites(tiny_llama.model, which, **options)
    assert all(word in str(error.value) for word in words)


def test_a_model_without_blocks() -> None:
    for model in (nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]), nn.ModuleList([nn.ReLU()])):
        with pytest.raises(ModelError, match="no stack of blocks"):
            find_sites(nn.Sequential(model))


def test_encoder_decoder_has_two_stacks_and_two_blocks_of_each_by_default() -> None:
    config = AutoConfig.for_model(
        "t5", d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=4, num_heads=4, vocab_size=50
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert find_stacks(model) == [Stack("encoder.block", 3), Stack("decoder.block", 4)]
    found = [(site.stack, site.block) for site in find_sites(model)]
    assert set(found) == {
        ("encoder.block", 1),
        ("encoder.block", 2),
        ("decoder.block", 2),
        ("decoder.block", 3),
    }
    assert all("DenseReluDense" in site.name for site in find_sites(model))


def test_classifier_without_a_decoder() -> None:
    config = AutoConfig.for_model(
        "bert",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=50,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    names = [site.name for site in find_sites(model, last=1)]
    assert names == ["bert.encoder.layer.2.intermediate.dense", "bert.encoder.layer.2.output.dense"]


def test_a_stack_within_a_block_belongs_to_the_block() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    assert find_stacks(model) == [Stack("layers", 2)]
    assert [site.name for site in find_sites(model, last=1)] == ["layers.1.experts.0", "layers.1.experts.1"]
