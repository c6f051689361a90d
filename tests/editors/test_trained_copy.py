"""Copies that have some parameters of their own, and which parameters stand above the trunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import build_model, random_texts, unchanged
from emendo.editors._trained_copy import above_trunk, trained_copy
from emendo.models.sites import find_sites
from emendo.models.text import collate
from emendo.models.trunk import Trunk


def test_a_twin_shares_what_is_not_its_own() -> None:
    model = build_model("llama").requires_grad_()
    name = "model.layers.3.mlp.up_proj.weight"
    own = nn.Parameter(model.get_parameter(name).detach() + 1)
    with unchanged(model):
        other = trained_copy(model, {name: own})
        assert other.get_parameter(name) is own
        for key, parameter in model.named_parameters():
            if key != name:
                theirs = other.get_parameter(key)
                assert theirs is not parameter and theirs.data_ptr() == parameter.data_ptr()
                assert not theirs.requires_grad
        batch = collate(random_texts("llama", 6))
        other(batch.input_ids).logits.sum().backward()
    assert own.grad is not None
    assert other.lm_head.weight is other.model.embed_tokens.weight  # tied, as in the model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_twin_of_a_model_in_half_precision_is_in_float32(dtype: torch.dtype) -> None:
    model = build_model("gpt2", dtype)
    with unchanged(model):
        other = trained_copy(model, {})
    for name, parameter in other.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.equal(model.get_parameter(name).float())


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("llama", "mlp"),
        ("gpt2", "mlp"),
        ("opt", "mlp"),
        ("t5", "mlp"),
        ("t5-gated", "decoder.block.3.*.wi_0"),
        ("bart", "mlp"),
        ("bert", "mlp"),
    ],
)
def test_what_stands_above_the_trunk(kind: str, pattern: str) -> None:
    """Other values there leave the trunk's output as it was; but for words, nothing else matters after it."""
    model = build_model(kind)
    sites = find_sites(model, pattern, last=2 if pattern == "mlp" else None)
    with unchanged(model):
        above = set(above_trunk(model, sites))
    parameters = dict(model.named_parameters())
    assert {f"{site.name}.weight" for site in sites} <= above < parameters.keys()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    words = {id(p) for end in ends if end is not None for p in end.parameters()}
    below = {name for name, p in parameters.items() if id(p) not in words} - above
    below = {name for name in below if "relative_attention_bias" not in name}  # T5 uses it on both sides

    batch = collate(random_texts(kind, 9, 6))
    trunk = Trunk(model, sites)
    hidden = trunk.run(batch)
    logits = trunk.logits(batch, hidden)
    for names, same_hidden, same_logits in ((above, True, False), (below, False, True)):
        other = Trunk(
            trained_copy(model, {name: nn.Parameter(torch.randn_like(parameters[name])) for name in names}),
            sites,
        )
        assert other.run(batch).equal(hidden) == same_hidden
        assert other.logits(batch, hidden).equal(logits) == same_logits
