"""Fingerprints of models."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn

from cases import build_lm, build_model
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import compose
from emendo.errors import MismatchError
from emendo.low_rank import LowRank, applied
from emendo.models import _fingerprint as module
from emendo.models._fingerprint import difference, fingerprint, same_model
from emendo.models.lm import LM
from emendo.models.loading import load
from emendo.models.sites import find_sites


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_same_weights_same_fingerprint(kind: str) -> None:
    found = fingerprint(build_model(kind))
    assert re.fullmatch("[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{8}", found)
    assert fingerprint(build_model(kind)) == found
    assert fingerprint(build_model(kind).to(torch.bfloat16)) == found
    assert fingerprint(build_model(kind, torch.bfloat16).float()) == found
    assert fingerprint(build_model(kind).train()) == found


def test_other_weights_other_name() -> None:
    names = {
        fingerprint(build_model(kind, seed=seed)) for kind in ("llama", "gpt2", "mistral") for seed in (0, 1)
    }
    assert len(names) == 6


def test_names_and_shapes_count() -> None:
    a, b = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    nn.init.ones_(a.weight)
    nn.init.ones_(b.weight)
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(nn.ModuleDict({"x": a})) != fingerprint(nn.ModuleDict({"y": a}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_edit_changes_it_and_an_attached_one_does_not(kind: str) -> None:
    model = build_model(kind)
    site = find_sites(model, last=1)[0]
    weight = site.weight(model)
    left, right = torch.randn(site.d_out, 1), torch.randn(1, site.d_in)
    size = 0.01 * weight.norm() / LowRank(left, right).norm()  # ||dW|| / ||W|| = 1%
    deltas = {site.name: LowRank(left * size, right)}
    before = fingerprint(model)
    with applied(model, deltas):
        assert fingerprint(model) == before
    merged = copy.deepcopy(model)
    site.weight(merged).add_(deltas[site.name].dense())
    assert fingerprint(merged) != before
    assert fingerprint(model) == before


# ------------------------------------------------------------------------ everything that decides the answers


def test_every_weight_counts() -> None:
    model = build_model("llama")
    before = fingerprint(model)
    model.model.embed_tokens.weight[5, 7] += 1  # one value of 10,000
    assert not same_model(fingerprint(model), before)
    model = build_model("llama", hidden_size=128, intermediate_size=256)
    before = fingerprint(model)
    flat = model.model.layers[1].mlp.up_proj.weight.view(-1)
    step = len(flat) // 1024
    assert step > 8
    flat[torch.arange(len(flat)) % step != 0] = 0  # all but the sample
    after = fingerprint(model)
    assert not same_model(after, before)
    assert after.split("-")[0] == before.split("-")[0]
    assert difference(after, before) == "The weights differ"


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"rms_norm_eps": 0.5},
        {"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}},
    ],
)
def test_settings_that_change_the_output_count(change: dict[str, Any]) -> None:
    one, other = build_lm("llama"), build_lm("llama", **change)
    assert not torch.equal(one.next_logits(["A b"]), other.next_logits(["A b"]))
    assert difference(one.fingerprint, other.fingerprint) == "The config differs"
    assert not same_model(one.fingerprint, other.fingerprint)


def test_settings_that_do_not_change_the_output_do_not_count() -> None:
    one, other = build_lm("llama"), build_lm("llama")
    other.model.config.update(
        {
            "use_cache": False,
            "_name_or_path": "elsewhere",
            "architectures": ["X"],
            "transformers_version": "9",
        }
    )
    assert other.fingerprint == one.fingerprint


def _permuted(lm: LM) -> None:
    backend = json.loads(lm.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    vocabulary = backend["model"]["vocab"]
    one, other = [token for token in vocabulary if len(token) > 2][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    lm.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))  # type: ignore[attr-defined]


def _other_merges(lm: LM) -> None:
    backend = json.loads(lm.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend["model"]["merges"].reverse()
    lm.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))  # type: ignore[attr-defined]


def _other_splitting(lm: LM) -> None:
    lm.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[attr-defined]


def _other_end(lm: LM) -> None:
    lm.tokenizer.eos_token = lm.tokenizer.bos_token


def _other_template(lm: LM) -> None:
    lm.tokenizer.chat_template = "{{ messages }}"


@pytest.mark.parametrize("change", [_permuted, _other_merges, _other_splitting, _other_end, _other_template])
def test_the_tokenizer_counts(change: Callable[[LM], None]) -> None:
    one, other = build_lm("llama"), build_lm("llama")
    change(other)
    assert difference(one.fingerprint, other.fingerprint) == "The tokenizer differs"
    assert not same_model(one.fingerprint, other.fingerprint)


def test_using_a_tokenizer_does_not_change_it() -> None:
    one, other = build_lm("llama"), build_lm("llama")
    other.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2, return_tensors="pt")
    other.tokenizer.pad_token = "<|end|>"
    assert other.fingerprint == one.fingerprint


def test_a_language_model_has_the_fingerprint_of_its_parts(tiny_llama: LM) -> None:
    assert tiny_llama.fingerprint == fingerprint(tiny_llama.model, tiny_llama.tokenizer)
    assert tiny_llama.fingerprint.startswith(fingerprint(tiny_llama.model))
    assert same_model(tiny_llama.fingerprint, fingerprint(tiny_llama.model))


# ---------------------------------------------------------------------- fingerprints of before, and the cache


def test_what_carries_a_fingerprint_of_before_still_fits() -> None:
    """Edits, editors and ledgers of earlier versions carry the first part alone."""
    lm, other = build_lm("llama"), build_lm("llama", seed=1)
    edit = Mend(find_sites(lm.model), MendConfig(rank=4)).edit(lm, "The capital is", "Paris")
    old = replace(edit, origin=replace(edit.origin, fingerprint=lm.fingerprint[:16]))
    old.check(lm)
    old.check(lm.model)
    assert compose([old, edit]).origin.fingerprint == lm.fingerprint[:16]
    for each in (old, edit):
        with pytest.raises(MismatchError, match="The weights differ"):
            each.check(other)
    with pytest.raises(MismatchError, match="The config differs"):
        edit.check(build_lm("llama", rms_norm_eps=0.5))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes each time that all weights are hashed; caches models of any size."""
    calls: list[int] = []
    weights = module._weights
    monkeypatch.setattr(module, "_weights", lambda model: calls.append(1) or weights(model))
    monkeypatch.setattr(module, "_WORTH_CACHING", 0)
    return calls


def test_all_weights_are_hashed_once_per_file(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
    original = build_lm("llama")
    folder = tmp_path / "model"
    original.model.save_pretrained(folder)
    original.tokenizer.save_pretrained(folder)
    expected = original.fingerprint
    counted.clear()
    assert [load(folder).fingerprint for _ in range(3)] == [expected] * 3
    assert len(counted) == 1
    assert load(folder).reading(chat=False).fingerprint == expected
    bf16 = load(folder, dtype="bfloat16")
    assert bf16.fingerprint == expected and len(counted) == 2

    changed = load(folder)  # in memory, in place
    changed.model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    assert not same_model(changed.fingerprint, expected) and len(counted) == 3

    other = build_lm("llama", seed=1)  # in the file
    other.model.save_pretrained(folder)
    assert load(folder).fingerprint == other.fingerprint != expected

    for file in (tmp_path / "cache" / "fingerprints").iterdir():
        file.write_text("{damaged")
    assert load(folder).fingerprint == other.fingerprint


def test_a_cache_that_cannot_be_written_is_no_error(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "file" / "cache"))
    original = build_lm("llama")
    original.model.save_pretrained(tmp_path / "model")
    original.tokenizer.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").fingerprint == original.fingerprint
