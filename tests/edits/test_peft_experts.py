"""Edits of fused experts as PEFT adapters of whole parameters, and such adapters as edits, against PEFT itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cases import records, unchanged
from emendo.edits import Edit, Origin, Request, diff, from_peft, prove, to_peft
from emendo.errors import ModelError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from mixtures import MIXTURES, build_mixture, mixture

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and torch's own

PROMPTS = [record.prompt for record in records(3)]
WHICH = ["mlp", "all", "*.layers.2.*.down_proj", "*.layers.3.*.[13].gate_up_proj"]


def an_edit(lm: LM, which: str) -> Edit:
    """A random change, of another rank at each expert."""
    deltas = {}
    for number, site in enumerate(find_sites(lm.model, which)):
        rank = 1 + number % 3
        delta = LowRank(torch.randn(site.d_out, rank), torch.randn(rank, site.d_in))
        deltas[site.name] = delta.scale(0.5 * float(site.weight(lm.model).norm() / delta.norm()))
    origin = Origin(lm.fingerprint, lm.name, "made up", {}, (Request(PROMPTS[0], "Oslo"),), "2026-01-01")
    return Edit(deltas, origin)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", MIXTURES)
def test_peft_serves_an_edit_of_experts(tmp_path: Path, kind: str, which: str) -> None:
    lm = build_mixture(kind)
    edit = an_edit(lm, which)
    with unchanged(lm.model):
        clean = lm.next_logits(PROMPTS)
        with edit.applied(lm):
            expected = lm.next_logits(PROMPTS)
        assert to_peft(edit, lm, tmp_path / "adapter").logits_differ_by == pytest.approx(0, abs=1e-3)
    other = build_mixture(kind)
    PeftModel.from_pretrained(mixture(kind), str(tmp_path / "adapter"))  # a model that emendo never opened
    PeftModel.from_pretrained(other.model, str(tmp_path / "adapter")).eval()
    found = other.next_logits(PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - clean).abs().max() > 0.05
    back = from_peft(tmp_path / "adapter", lm)
    assert back.deltas.keys() == edit.deltas.keys()
    assert diff(edit, back).error < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(name.split(".")[-2] == "experts" for name in config["target_parameters"])
    assert not any("experts" in name for name in config["target_modules"])


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"down_proj": 5}, "use_rslora": True}])
@pytest.mark.parametrize("kind", MIXTURES)
def test_an_adapter_of_experts_that_peft_trained_is_read(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    model = mixture(kind)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "experts.down_proj"],
        **options,
    )
    wrapped = get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(str(tmp_path))
    lm = build_mixture(kind)
    ids = torch.tensor([lm.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        with unchanged(lm.model), from_peft(tmp_path, lm).applied(lm):
            torch.testing.assert_close(lm.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (lm.model(ids).logits - expected).abs().max() > 0.1


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_wrong_adapter_of_experts_is_named(tmp_path: Path) -> None:
    lm = build_mixture("mixtral")
    edit = an_edit(lm, "mlp")
    to_peft(edit, lm, tmp_path)
    name = next(iter(edit.deltas))
    more = dataclasses.replace(edit, deltas={**edit.deltas, name: edit.deltas[name].scale(1.01)})
    with pytest.raises(ModelError, match=rf"{name}.*experts of a mixture.*0.17.*--to merged"):
        prove(more, lm, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    for wrong, error, words in (
        ([*targets, "norm.weight"], RequestError, "norm.weight.*no parameter of fused experts"),
        ([*targets, "nowhere"], RequestError, "nowhere"),
        ([*targets, "layers.0.mlp.experts.down_proj"], StorageError, "no factors of .*layers.0"),
        (targets[:-1], Exception, "experts"),
        ("experts.down_proj", StorageError, "target_parameters"),
    ):
        change(tmp_path, target_parameters=wrong)
        with pytest.raises(error, match=words):
            from_peft(tmp_path, lm)
    change(tmp_path, target_parameters=targets, r=2)
    with pytest.raises(StorageError, match="has rank 12 over 4 experts"):
        from_peft(tmp_path, lm)
