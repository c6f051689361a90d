"""Mixtures of experts: fused experts as single matrices, against the model's own kernels; routers are no sites."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cases import DEPTH, INNER, VOCABULARY, WIDTH, unchanged
from emendo.editors.mend import Mend, MendConfig
from emendo.errors import ModelError
from emendo.low_rank import LowRank, applied
from emendo.models._experts import ExpertMatrix, open_experts
from emendo.models.capture import capture
from emendo.models.losses import per_example, token_nll
from emendo.models.sites import all_sites, find_sites, find_stacks
from emendo.models.text import Text, collate
from emendo.models.trunk import Trunk
from mixtures import EXPERTS, MIXTURES, SIZES, build_mixture, mixture


def texts() -> list[Text]:
    return [Text(tuple(torch.randint(3, VOCABULARY, (n,)).tolist()), n - 3) for n in (9, 6, 7)]


def losses(model: Any, batch: Any) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = logits.flatten(0, 1)[batch.positions]
    return per_example(token_nll(rows, batch.labels), batch.owner, len(batch))


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_experts_matrices_are_sites_and_no_router_is(kind: str) -> None:
    model = mixture(kind)
    with pytest.raises(ModelError, match=r"experts.*fused.*attention"):
        find_sites(model)
    open_experts(model)
    names = {site.name for site in find_sites(model)}
    assert names == {
        f"model.layers.{block}.mlp.experts.{expert}.{part}"
        for block in range(1, DEPTH)
        for expert in range(EXPERTS)
        for part in ("gate_up_proj", "down_proj")
    }
    assert {s.shape for s in find_sites(model)} == {(WIDTH, 2 * INNER), (INNER, WIDTH)}
    assert not any("router" in site.name or ".gate." in site.name for site in all_sites(model))


@pytest.mark.parametrize("kind", MIXTURES)
def test_opening_the_experts_changes_nothing(kind: str) -> None:
    model = mixture(kind)
    ids, keys = torch.randint(VOCABULARY, (2, 7)), list(model.state_dict())
    before = model(ids).logits
    open_experts(model)
    open_experts(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule("model.layers.3.mlp.experts.1.down_proj").weight.zero_()
    assert not twin.model.layers[3].mlp.experts.down_proj[1].any()
    assert model.model.layers[3].mlp.experts.down_proj[1].any()


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_factors_are_the_gradient_of_the_fused_parameter(kind: str) -> None:
    """Each text's own, by differentiating the model's own kernels in float64."""
    lm = build_mixture(kind, torch.float64)
    sites, some = find_sites(lm.model, last=2), texts()
    batch = collate(some)
    with unchanged(lm.model):
        _, factors = capture(lm.model, sites, lambda: losses(lm.model, batch))
    plain = mixture(kind, torch.float64)
    for example, text in enumerate(some):
        parameters = {
            name: p.requires_grad_()
            for name, p in plain.named_parameters()
            if "experts" in name and "bias" not in name
        }
        gradients = dict(
            zip(
                parameters,
                torch.autograd.grad(
                    losses(plain, collate([text])).sum(), list(parameters.values()), allow_unused=True
                ),
                strict=True,
            )
        )
        for site in sites:
            experts, expert, name = site.name.rsplit(".", 2)
            gradient = gradients[f"{experts}.{name}"][int(expert)]
            f = factors[site.name]
            own = f.owner == example
            found = f.delta[own].T @ f.u[own]
            expected = gradient.T if site.transposed else gradient
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MIXTURES)
def test_each_text_under_its_own_change_as_with_changed_weights(kind: str) -> None:
    lm = build_mixture(kind, torch.float64)
    sites, some = find_sites(lm.model, last=2), texts()
    deltas = {
        site.name: LowRank(
            0.1 * torch.randn(3, site.d_out, 2, dtype=torch.float64),
            torch.randn(3, 2, site.d_in, dtype=torch.float64),
        )
        for site in sites
    }
    batch = collate(some)
    with unchanged(lm.model), torch.no_grad(), applied(lm.model, deltas):
        together = losses(lm.model, batch)
    before = losses(lm.model, batch)
    for row, text in enumerate(some):
        twin = copy.deepcopy(lm.model)
        with torch.no_grad():
            for site in sites:
                site.weight(twin).add_(deltas[site.name][row].dense())
            torch.testing.assert_close(together[row], losses(twin, collate([text]))[0], rtol=1e-5, atol=1e-6)
        assert abs(float(together[row] - before[row])) > 1e-3


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_edit_of_experts(kind: str) -> None:
    """Also where no token of the text is routed to some expert; merged it gives the same."""
    lm = build_mixture(kind)
    editor = Mend(find_sites(lm.model), MendConfig(rank=4, alpha=0.1))
    with unchanged(lm.model):
        edit: Any = editor.edit(lm, "The capital of Fosoba is", "Rome")
        with edit.applied(lm):
            hooked = lm.next_logits(["The capital of Fosoba is"])
    plain = lm.next_logits(["The capital of Fosoba is"])
    assert not torch.allclose(hooked, plain, atol=1e-3)
    merged = edit.merge_(lm)
    torch.testing.assert_close(lm.next_logits(["The capital of Fosoba is"]), hooked, rtol=1e-3, atol=1e-3)
    merged.restore()
    assert torch.equal(lm.next_logits(["The capital of Fosoba is"]), plain)


def test_an_expert_without_tokens_has_no_rows() -> None:
    lm = build_mixture("mixtral")
    sites = find_sites(lm.model, last=1)
    experts = lm.model.get_submodule("model.layers.3.mlp.experts")
    some = collate([Text((5, 6), 1)])
    _, factors = capture(lm.model, sites, lambda: losses(lm.model, some))
    counts = {name.split(".")[-2]: len(f.u) for name, f in factors.items() if name.endswith("down_proj")}
    assert sorted(counts.values()) == [0, 0, 1, 1]  # one token, two experts
    assert all(m.rows is None for m in experts.modules() if isinstance(m, ExpertMatrix))
    empty = next(f for f in factors.values() if not len(f.u))
    assert not empty.lowrank(empty.delta, empty.u).dense().any()


def test_a_hybrid_is_one_stack_whatever_its_blocks_are() -> None:
    sizes = {
        **SIZES,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_dt_rank": 4,
    }
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **sizes)).eval().requires_grad_(False)
    )
    (stack,) = find_stacks(model)
    assert (stack.name, stack.depth) == ("model.layers", DEPTH)
    assert len({type(block) for block in model.get_submodule(stack.name).children()}) == 2
    open_experts(model)
    names = [site.name for site in find_sites(model)]
    assert names and not any(
        name.endswith("dt_proj") for name in names
    )  # its weight is used, its module never runs
    assert any(".experts." in name for name in names)
    Trunk(model, find_sites(model))


@pytest.mark.parametrize(
    ("kind", "router"), [("llama4_text", "router"), ("qwen2_moe", "gate"), ("zaya", "gate")]
)
def test_no_router_and_no_gate_is_a_site(kind: str, router: str) -> None:
    sizes = {
        **SIZES,
        "intermediate_size_mlp": INNER,
        "moe_intermediate_size": INNER,
        "num_experts_per_tok": 1,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    assert any(router in name for name, _ in model.named_modules())
    open_experts(model)
    parts = {part for site in all_sites(model) for part in site.name.split(".")}
    assert "down_proj" in parts
    assert not parts & {"router", "gate", "shared_expert_gate"}


def test_experts_in_a_list_are_no_sites_whatever_else_it_holds() -> None:
    """NLLB's experts stand beside a dropout; which tokens are routed to them is not known."""
    config = AutoConfig.for_model(
        "nllb-moe",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        num_experts=EXPERTS,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), DEPTH),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), INNER),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 2),
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    assert any("experts.expert_1.fc1" in name for name, _ in model.named_modules())
    parts = {part for site in all_sites(model) for part in site.name.split(".")}
    assert {"fc1", "fc2", "q_proj"} <= parts
    assert not parts & {"experts", "router", "classifier"}


def test_the_language_part_of_a_multimodal_model_is_edited() -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SIZES, "sliding_window": 8},
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert [stack.name for stack in find_stacks(model)] == ["model.language_model.layers"]
    assert all(site.name.startswith("model.language_model.") for site in find_sites(model))


class Twice(nn.Module):
    """A matrix that runs twice in a pass, as in models with shared blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4).double()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.layers[0](x).sin())  # type: ignore[no-any-return]


def test_a_matrix_that_runs_twice_has_the_rows_of_both_calls() -> None:
    model, x = Twice(), torch.randn(3, 2, 4, dtype=torch.float64)
    _, factors = capture(model, tuple(all_sites(model)), lambda: model(x).square().sum((1, 2)))
    (own,) = factors.values()
    assert own.owner.tolist() == sorted([0, 1, 2] * 4)
    for example in range(3):
        (expected,) = torch.autograd.grad(model(x[example]).square().sum(), [model.layers[0].weight])
        rows = own.owner == example
        torch.testing.assert_close(own.delta[rows].T @ own.u[rows], expected)
