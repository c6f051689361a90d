"""Loading models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM
from transformers.utils import logging as hf_logging

from cases import (
    ARCHITECTURES,
    CLASSES,
    CONTEXT,
    build_lm,
    build_model,
    build_tokenizer,
    of_kind,
    records_for,
)
from emendo.errors import ModelError
from emendo.models import loading as models
from emendo.models.lm import LM
from emendo.models.loading import cache_folder, load
from emendo.models.tokenization import to_texts


def saved(lm: LM, folder: Path) -> Path:
    """A model and its tokenizer, as `save_pretrained` leaves them."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(build_lm(request.param), tmp_path)


def message(name: str | Path, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        load(name, **options)
    return str(error.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", *of_kind("seq2seq", "classifier")])
def test_load_from_a_folder(tmp_path: Path, kind: str) -> None:
    original = build_lm(kind)
    lm = load(saved(original, tmp_path))
    assert lm.name == str(tmp_path)
    assert lm.kind == original.kind == ARCHITECTURES[kind].kind
    assert type(lm.model) is type(original.model)
    assert lm.fingerprint == original.fingerprint
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    assert lm.context == (None if kind.startswith("t5") else CONTEXT)
    assert lm.device == torch.device("cpu")
    facts = [(record.prompt, record.target) for record in records_for(original, 3)]
    texts = to_texts(original, facts)
    assert to_texts(lm, facts) == texts
    for found, expected in zip(lm.logits(texts), original.logits(texts), strict=True):
        assert torch.equal(found, expected)
    assert lm.generate([prompt for prompt, _ in facts], 4) == original.generate([p for p, _ in facts], 4)
    if lm.kind == "classifier":
        assert lm.labels == CLASSES


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5-gated", "bart", "bert"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
def test_load_in_another_dtype(tmp_path: Path, kind: str, dtype: Any) -> None:
    lm = load(str(saved(build_lm(kind), tmp_path)), dtype=dtype, device="cpu")
    wanted = torch.float16 if dtype == "float16" else torch.bfloat16
    exact = {name for name, p in lm.model.named_parameters() if p.dtype != wanted}
    # transformers keeps T5's `wo` in float32: in float16 it overflows.
    assert all(".wo." in name for name in exact)
    assert bool(exact) == (kind == "t5-gated" and wanted == torch.float16)
    (record,) = records_for(lm, 1)
    rows = lm.logits(to_texts(lm, [(record.prompt, record.target)]))[0]
    assert rows.dtype == wanted
    assert lm.dtype == str(wanted).removeprefix("torch.")
    assert rows.isfinite().all()


def test_loading_leaves_the_loggers_as_they_were(folder: Path) -> None:
    before = (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())
    load(folder)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


def test_a_tokenizer_without_padding_gets_its_end_token(tmp_path: Path) -> None:
    lm, tokenizer = build_lm("gpt2"), build_tokenizer()
    tokenizer.pad_token = None
    lm.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer.pad_token_id == tokenizer.eos_token_id


def test_no_such_model(tmp_path: Path) -> None:
    for name in ("no-such-model", tmp_path / "nowhere", tmp_path):
        text = message(name)
        assert repr(str(name)) in text
        assert "smollm2-135m" in text
        assert "folder" in text


def test_no_such_dtype(folder: Path) -> None:
    assert message(folder, dtype="int4") == "dtype 'int4' is not one of float32, bfloat16, float16, fastest."


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    build_lm("llama").model.save_pretrained(tmp_path)
    assert "tokenizer" in message(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_file(tmp_path: Path, file: str) -> None:
    lm = build_lm("llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    assert str(tmp_path) in message(tmp_path)


@pytest.mark.parametrize(
    ("kind", "what", "missing"),
    [
        ("mistral", "causal language model", "lm_head.weight"),
        ("t5-gated", "encoder-decoder", "decoder.block.3.layer.2.DenseReluDense.wo.weight"),
        ("bart", "encoder-decoder", "model.decoder.layers.3.fc2.bias"),
        ("bert", "sequence classifier", "classifier.bias"),
        ("distilbert", "sequence classifier", "classifier.bias"),
    ],
)
def test_what_is_missing_is_not_made_up(tmp_path: Path, kind: str, what: str, missing: str) -> None:
    lm = build_lm(kind)
    saved(lm, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    text = message(tmp_path)
    assert f"not a whole {what}" in text
    assert missing in text


def test_a_model_without_its_head_is_not_made_up(tmp_path: Path) -> None:
    lm: Any = build_lm("mistral")
    lm.model.get_decoder().save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" in message(tmp_path)


def test_a_model_that_fills_gaps_is_refused(tmp_path: Path) -> None:
    lm = build_lm("bert")
    gaps = LM(AutoModelForMaskedLM.from_config(build_model("bert").config), lm.tokenizer)
    assert "BertForMaskedLM" in message(saved(gaps, tmp_path))


def test_built_in_model_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path))
    monkeypatch.setitem(models.BUILT_IN, "made-up", ("no_such_package_at_all", "model.gguf"))
    assert "pip install" in message("made-up")


def test_built_in_model_comes_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = folder / "cache" / "models" / "made-up"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(folder)
    monkeypatch.setenv("EMENDO_CACHE", str(folder / "cache"))
    monkeypatch.setitem(models.BUILT_IN, "made-up", ("no_such_package_at_all", "model.gguf"))
    assert load("made-up").name == "made-up"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EMENDO_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "emendo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "emendo"


@pytest.mark.parametrize(("speed", "wanted"), [(3.0, "bfloat16"), (1.5, "float32"), (0.2, "float32")])
def test_the_fastest_dtype_is_the_one_that_is_measured_as_such(
    monkeypatch: pytest.MonkeyPatch, folder: Path, speed: float, wanted: str
) -> None:
    """A clock that runs as if bfloat16 were so many times as fast as float32."""
    clock = [0.0]
    product = torch.Tensor.__matmul__

    def timed(a: Tensor, b: Tensor) -> Tensor:
        clock[0] += 1 / speed if a.dtype == torch.bfloat16 else 1.0
        return product(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", timed)
        patch.setattr(models.time, "perf_counter", lambda: clock[0])
        assert models.fastest_dtype() == wanted
        assert load(str(folder), dtype="fastest").dtype == wanted


def test_a_device_without_bfloat16_has_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones

    def refused(size: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported here")
        return ones(size, dtype=dtype, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", refused)
        assert models.fastest_dtype() == "float32"
