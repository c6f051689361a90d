"""Loading models, and what an LM does by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from cases import CONTEXT, build_lm, build_tokenizer
from emendo import models
from emendo.errors import ModelError, RequestError
from emendo.models import LM, cache_folder, load


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model and its tokenizer, as `save_pretrained` leaves them."""
    lm = build_lm(request.param)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def message(name: str | Path, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        load(name, **options)
    return str(error.value)


def test_load_from_a_folder(folder: Path) -> None:
    lm = load(folder)
    kind = lm.model.config.model_type
    original = build_lm(kind)
    assert lm.name == str(folder)
    assert lm.fingerprint == original.fingerprint
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    assert lm.context == CONTEXT
    assert lm.device == torch.device("cpu")
    ids = original.tokenizer("The capital of", return_tensors="pt").input_ids
    assert torch.equal(lm.tokenizer("The capital of", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, original.model(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
def test_load_in_another_dtype(folder: Path, dtype: Any) -> None:
    lm = load(str(folder), dtype=dtype, device="cpu")
    wanted = torch.float16 if dtype == "float16" else torch.bfloat16
    assert {parameter.dtype for parameter in lm.model.parameters()} == {wanted}


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
    assert message(folder, dtype="int4") == "dtype 'int4' is not one of float32, bfloat16, float16."


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


def test_a_model_without_its_head_is_not_made_up(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = build_lm("mistral").model
    model.get_decoder().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    text = message(tmp_path)
    assert "not a whole causal language model" in text
    assert "lm_head.weight" in text


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


def greedy(lm: LM, prompt: str, n: int) -> str:
    """The slow reference: one full pass for each token."""
    ids = lm.tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(n):
        token = lm.model(ids).logits[0, -1].argmax()
        if int(token) == lm.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return lm.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@torch.no_grad()
def test_generate_is_greedy_and_padding_does_not_matter(tiny_llama: LM, tiny_gpt2: LM) -> None:
    prompts = ["The capital of Bababa is", "A", "Water is made of hydrogen and "]
    for lm in (tiny_llama, tiny_gpt2):
        expected = [greedy(lm, prompt.rstrip(), 6) for prompt in prompts]
        assert lm.generate(prompts, max_new_tokens=6) == expected
        assert lm.generate(prompts[0], max_new_tokens=6) == expected[0]


def test_top_are_the_most_likely_next_tokens(tiny_llama: LM) -> None:
    top = tiny_llama.top("The capital of Bababa is ", k=4)
    ids = tiny_llama.tokenizer("The capital of Bababa is", return_tensors="pt").input_ids
    with torch.no_grad():
        probabilities = tiny_llama.model(ids).logits[0, -1].softmax(-1)
    order = probabilities.argsort(descending=True)[:4]
    assert [text for text, _ in top] == [tiny_llama.tokenizer.decode([int(i)]) for i in order]
    assert [p for _, p in top] == pytest.approx(probabilities[order].tolist())


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(tiny_llama: LM, prompt: str) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        tiny_llama.generate(prompt)
    with pytest.raises(RequestError, match="prompt is empty"):
        tiny_llama.top(prompt)
