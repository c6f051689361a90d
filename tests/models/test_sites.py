"""Finding weight matrices by structure."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from cases import ARCHITECTURES, DEPTH, INNER, WIDTH, build_model, unchanged
from emendo.errors import ModelError
from emendo.models.lm import LM
from emendo.models.sites import Stack, all_sites, find_sites, find_stacks, kind_of

KINDS = list(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_every_matrix(kind: str) -> None:
    """By default those of the last three blocks, or of the last two of both stacks (MEND, footnote 3)."""
    model, known = build_model(kind), ARCHITECTURES[kind]
    assert find_stacks(model) == [Stack(blocks.stack, DEPTH) for blocks in known.blocks]
    last = range(DEPTH - known.edited, DEPTH)
    names = {which: [site.name for site in find_sites(model, which)] for which in ("mlp", "attention")}
    for which, found in names.items():
        assert sorted(found) == sorted(known.sites(which, last))
    assert names["mlp"] == [site.name for site in find_sites(model)]
    every = [site.name for site in find_sites(model, "all", blocks=range(DEPTH))]
    assert set(every) == {name for which in names for name in known.sites(which, range(DEPTH))}
    order = [name for name, _ in model.named_modules()]
    assert every == sorted(every, key=order.index)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_site(kind: str) -> None:
    """Every other matrix: embeddings, what projects to words or classes, a pooler."""
    model = build_model(kind)
    sites = {site.name for site in all_sites(model)}
    rest = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)} - sites
    ends = {"lm_head", "embed_out", "classifier", "dense", "out_proj", "pre_classifier"}
    assert {name.split(".")[-1] for name in rest} <= ends
    assert len(rest) == {"causal": 1, "seq2seq": 1, "classifier": 2}[ARCHITECTURES[kind].kind]


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
            assert site.attention == (site.name in known.sites("attention", range(DEPTH)))
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


def test_the_stacks_of_an_encoder_decoder_may_differ_in_depth() -> None:
    model = build_model("t5", num_decoder_layers=3)
    assert find_stacks(model) == [Stack("encoder.block", 4), Stack("decoder.block", 3)]
    found = {(site.stack.split(".")[0], site.block) for site in find_sites(model)}
    assert found == {("encoder", 2), ("encoder", 3), ("decoder", 1), ("decoder", 2)}
    only = {(site.stack.split(".")[0], site.block) for site in find_sites(model, blocks=[3, -3])}
    assert only == {("encoder", 3), ("encoder", 1), ("decoder", 0)}


@pytest.mark.parametrize(
    ("kind", "pattern", "count"),
    [
        ("t5", "decoder.*.wo", DEPTH),
        ("t5-gated", "*.wi_[01]", 4 * DEPTH),
        ("bart", "model.decoder.layers.3.fc*", 2),
        ("bart", "*encoder_attn*", 4 * DEPTH),
        ("roberta", "*.3.output.dense", 1),
        ("distilbert", ["*.0.ffn.lin?", "*q_lin"], 2 + DEPTH),
    ],
)
def test_patterns_in_other_kinds_of_model(kind: str, pattern: str | list[str], count: int) -> None:
    names = [site.name for site in find_sites(build_model(kind), pattern)]
    patterns = [pattern] if isinstance(pattern, str) else pattern
    assert len(names) == count
    assert all(any(fnmatchcase(name, p) for p in patterns) for name in names)


def test_a_stack_within_a_block_belongs_to_the_block() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    assert find_stacks(model) == [Stack("layers", 2)]
    assert [site.name for site in find_sites(model, last=1)] == ["layers.1.experts.0", "layers.1.experts.1"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_model(kind: str) -> None:
    assert kind_of(build_model(kind)) == ARCHITECTURES[kind].kind


def test_a_model_that_says_neither_words_nor_classes() -> None:
    for kind in ("gpt2", "t5", "bert"):
        headless = AutoModel.from_config(build_model(kind).config)
        with pytest.raises(ModelError, match="no vocabulary projection and no classes"):
            kind_of(headless)
