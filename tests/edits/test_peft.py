"""Edits as PEFT adapters, served by PEFT itself; adapters as edits; merged checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from cases import build_lm, build_tokenizer, records, unchanged
from emendo.edits import Edit, Origin, Request, diff, from_peft, prove, to_merged, to_peft
from emendo.errors import MismatchError, ModelError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.loading import load
from emendo.models.sites import find_sites

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT

PROMPTS = [record.prompt for record in records(3)]


def an_edit(lm: LM, rank: int = 5) -> Edit:
    """A random change, of another rank in each block, large enough to matter."""
    torch.manual_seed(2)
    deltas = {}
    for site in find_sites(lm.model):
        r = rank + site.block
        delta = LowRank(torch.randn(site.d_out, r), torch.randn(r, site.d_in))
        deltas[site.name] = delta.scale(0.1 * float(site.weight(lm.model).norm() / delta.norm()))
    origin = Origin(lm.fingerprint, lm.name, "made up", {}, (Request(PROMPTS[0], "Oslo"),), "2026-01-01")
    return Edit(deltas, origin)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_peft_serves_the_edit(tmp_path: Path, kind: str) -> None:
    lm = build_lm(kind)
    edit = an_edit(lm)
    with unchanged(lm.model):
        with edit.applied(lm):
            expected = lm.next_logits(PROMPTS)
        clean = lm.next_logits(PROMPTS)
    assert to_peft(edit, lm, tmp_path / "adapter").error == 0.0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == edit.rank  # uniform, padded with zeros
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    other = build_lm(kind)
    PeftModel.from_pretrained(other.model, str(tmp_path / "adapter")).eval()
    found = other.next_logits(PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - clean).abs().max() > 0.1
    assert "Oslo" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_failed_proof_is_an_error_and_leaves_the_model_as_it_was(tmp_path: Path, tiny_llama: LM) -> None:
    edit = an_edit(tiny_llama)
    to_peft(edit, tiny_llama, tmp_path / "adapter")
    assert prove(edit, tiny_llama, tmp_path / "adapter", PROMPTS) < 1e-4
    name = next(iter(edit.deltas))
    more = dataclasses.replace(edit, deltas={**edit.deltas, name: edit.deltas[name].scale(1.01)})
    less = dataclasses.replace(edit, deltas={n: d for n, d in edit.deltas.items() if n != name})
    for other in (more, less):
        with pytest.raises(ModelError, match=name):
            prove(other, tiny_llama, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT cannot load it"):
        prove(edit, tiny_llama, tmp_path / "adapter")
    assert not any("lora" in name for name, _ in tiny_llama.model.named_modules())


@pytest.mark.parametrize("trains", [False, True])
def test_a_proof_leaves_the_gradients_flags(tmp_path: Path, trains: bool) -> None:
    lm = build_lm("llama")
    edit = an_edit(lm)
    lm.model.requires_grad_(trains)
    to_peft(edit, lm, tmp_path / "adapter")
    assert all(parameter.requires_grad == trains for parameter in lm.model.parameters())


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_classifier_is_exported_with_its_head(tmp_path: Path, kind: str) -> None:
    lm = build_lm(kind)
    edit = an_edit(lm)
    with unchanged(lm.model):
        assert to_peft(edit, lm, tmp_path / "adapter").logits_differ_by == pytest.approx(0, abs=1e-4)
    assert diff(edit, from_peft(tmp_path / "adapter", lm)).error < 1e-6
    lm.model.save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_config.json"
    base = {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(json.loads(file.read_text()) | base))
    found = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter")).eval()
    with edit.applied(lm):
        expected = lm.next_logits(PROMPTS)
    other = LM(found.get_base_model(), lm.tokenizer)
    torch.testing.assert_close(other.next_logits(PROMPTS), expected, rtol=1e-4, atol=1e-4)
    head = next(name for name, _ in lm.model.named_modules() if name.endswith(("classifier", "score")))
    for parameter in lm.model.get_submodule(head).parameters():
        parameter.add_(1.0)
    with pytest.raises(RequestError, match=head):  # a trained head is more than a low-rank change
        from_peft(tmp_path / "adapter", lm)


def test_an_adapter_that_peft_does_not_serve_is_not_written(tmp_path: Path) -> None:
    """PEFT renames shared experts when it loads an adapter, and drops their factors."""
    lm = build_deepseek()
    (name,) = (s.name for s in find_sites(lm.model, "*layers.3*shared_experts.down_proj"))
    edit = dataclasses.replace(an_edit(lm), deltas={name: LowRank(torch.ones(32, 2), torch.ones(2, 16))})
    with unchanged(lm.model):
        with pytest.raises(ModelError, match=f"{name}.*--to merged"):
            to_peft(edit, lm, tmp_path / "adapter")
        assert not any(tmp_path.iterdir())
        to_merged(edit, lm, tmp_path / "merged")
    with edit.applied(lm):
        expected = lm.next_logits(PROMPTS)
    assert (expected - lm.next_logits(PROMPTS)).abs().max() > 0.01
    torch.testing.assert_close(load(tmp_path / "merged").next_logits(PROMPTS), expected, rtol=1e-3, atol=1e-3)


def build_deepseek() -> LM:
    config = DeepseekV3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=96,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LM(DeepseekV3ForCausalLM(config).eval().requires_grad_(False), build_tokenizer(), "tiny-deepseek")


def test_an_edit_without_requests_is_exported(tmp_path: Path, tiny_llama: LM) -> None:
    to_peft(an_edit(tiny_llama), tiny_llama, tmp_path / "adapter")
    edit = from_peft(tmp_path / "adapter", tiny_llama)
    assert edit.origin.requests == ()
    assert to_peft(edit, tiny_llama, tmp_path / "again").logits_differ_by == pytest.approx(0, abs=1e-4)


def test_the_adapter_names_a_base_that_other_tools_load(tmp_path: Path, tiny_llama: LM) -> None:
    def base(name: str) -> str:
        lm = dataclasses.replace(tiny_llama, name=name)
        to_peft(an_edit(lm), lm, tmp_path / "adapter", overwrite=True)
        found: str = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        return found

    (tmp_path / "base").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert base("base") == base("./base") == str(tmp_path / "base")
    assert base("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base("some/model") == "some/model"


def test_a_capped_rank_states_its_error(tmp_path: Path, tiny_llama: LM) -> None:
    edit = an_edit(tiny_llama)
    adapter = to_peft(edit, tiny_llama, tmp_path / "adapter", max_rank=4)
    assert adapter.rank == 4
    back = from_peft(tmp_path / "adapter", tiny_llama)
    lost = sum(float((edit.deltas[n].dense() - back.deltas[n].dense()).square().sum()) for n in edit.deltas)
    size = sum(float(delta.dense().square().sum()) for delta in edit.deltas.values())
    assert adapter.error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert 0.1 < adapter.error < 1
    assert to_peft(edit, tiny_llama, tmp_path / "wide", max_rank=16).rank == 16
    assert from_peft(tmp_path / "wide", tiny_llama).rank == 16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_that_peft_trained_is_read_as_an_edit(tmp_path: Path, kind: str) -> None:
    lm = build_lm(kind)
    modules = [site.name.rpartition(".")[2] for site in find_sites(lm.model)]
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=sorted(set(modules)),
        rank_pattern={modules[-1]: 2},
        alpha_pattern={modules[-1]: 6},
        fan_in_fan_out=kind == "gpt2",
    )
    other = build_lm(kind)
    wrapped = get_peft_model(other.model, config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    expected = other.next_logits(PROMPTS)
    edit = from_peft(tmp_path / "adapter", lm)
    with unchanged(lm.model), edit.applied(lm):
        torch.testing.assert_close(lm.next_logits(PROMPTS), expected.detach(), rtol=1e-4, atol=1e-4)
        assert (lm.next_logits(PROMPTS) - build_lm(kind).next_logits(PROMPTS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")],
)
def test_adapters_that_are_more_than_low_rank_changes_are_refused(
    tmp_path: Path, tiny_llama: LM, change: dict[str, object], words: str
) -> None:
    to_peft(an_edit(tiny_llama), tiny_llama, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RequestError, match=words):
        from_peft(tmp_path / "adapter", tiny_llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_holds_the_edit(tmp_path: Path, tiny_llama: LM, dtype: torch.dtype) -> None:
    edit = an_edit(tiny_llama)
    loss = to_merged(edit, tiny_llama, tmp_path / "merged", dtype=dtype).loss
    assert loss < 1e-5 if dtype == torch.float32 else 1e-3 < loss < 0.1
    with edit.applied(tiny_llama):
        expected = tiny_llama.next_logits(PROMPTS)
    found = load(tmp_path / "merged", dtype=dtype).next_logits(PROMPTS)
    close = 1e-4 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(found.float(), expected, rtol=close, atol=close)


def test_a_model_that_transformers_cannot_save_is_named(tmp_path: Path) -> None:
    lm = build_lm("llama")
    lm.model.generation_config.update(temperature=0.5, top_p=0.9, do_sample=False)
    with unchanged(lm.model), pytest.raises(ModelError, match="generation"):
        to_merged(an_edit(lm), lm, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_a_pickle_is_not_read(tmp_path: Path, tiny_llama: LM) -> None:
    to_peft(an_edit(tiny_llama), tiny_llama, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(StorageError, match="pickle"):
        from_peft(tmp_path / "adapter", tiny_llama)


def test_what_is_refused(tmp_path: Path, tiny_llama: LM, tiny_gpt2: LM) -> None:
    edit = an_edit(tiny_llama)
    with pytest.raises(MismatchError):
        to_peft(edit, tiny_gpt2, tmp_path / "adapter")
    with pytest.raises(RequestError, match="max_rank=0"):
        to_peft(edit, tiny_llama, tmp_path / "adapter", max_rank=0)
    to_peft(edit, tiny_llama, tmp_path / "adapter")
    with pytest.raises(StorageError, match="already holds"):
        to_peft(edit, tiny_llama, tmp_path / "adapter")
    with pytest.raises(StorageError, match="does not exist"):
        from_peft(tmp_path / "nothing", tiny_llama)
