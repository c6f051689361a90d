"""Loading models."""

from __future__ import annotations

import io
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.utils import logging as hf_logging

from cases import (
    ARCHITECTURES,
    CLASSES,
    CONTEXT,
    DEPTH,
    HEADS,
    INNER,
    VOCABULARY,
    WIDTH,
    build_lm,
    build_model,
    build_tokenizer,
    of_kind,
    records_for,
)
from emendo._storage import cache_folder
from emendo.errors import ModelError, RequestError, StorageError, UnusedWeightsWarning
from emendo.models import devices
from emendo.models import loading as models
from emendo.models._fingerprint import fingerprint
from emendo.models.lm import LM
from emendo.models.loading import load
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
        patch.setattr(devices.time, "perf_counter", lambda: clock[0])
        assert devices.fastest_dtype() == wanted
        assert load(str(folder), dtype="fastest").dtype == wanted


def test_a_device_without_bfloat16_has_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones

    def refused(size: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported here")
        return ones(size, dtype=dtype, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", refused)
        assert devices.fastest_dtype() == "float32"


# ------------------------------------------------------------------------------ no code, and no connection


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every name that is looked up and every connection that is opened; none succeeds."""
    calls: list[str] = []

    def refused(*args: Any, **_: Any) -> None:
        calls.append(str(args))
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)  # as on a user's machine
    return calls


def with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


CODE = (
    "import pathlib; pathlib.Path({!r}).write_text('ran')\nfrom transformers import PretrainedConfig as C\n"
)


@pytest.mark.parametrize("where", ["config", "model", "tokenizer", "all"])
@pytest.mark.parametrize("known", [False, True], ids=["own type", "known type"])
def test_code_of_a_model_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str], where: str, known: bool
) -> None:
    folder, trace = saved(build_lm("llama"), tmp_path / "model"), tmp_path / "trace"
    (folder / "own.py").write_text(CODE.format(str(trace)))
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C", "AutoTokenizer": ["own.C", "own.C"]}
    names = {"config": "AutoConfig", "model": "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}
    auto = auto if where == "all" else {names[where]: auto[names[where]]}
    with_config(folder, auto_map=auto, **({} if known else {"model_type": "own"}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    if known:
        load(folder)  # by the code of transformers
    else:
        assert str(folder) in message(folder)
        if where in ("config", "all"):
            assert "never runs code" in message(folder)
    assert not trace.exists()
    assert not no_network


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "user/elsewhere"},
        {"tokenizer_class": "user/elsewhere"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "user/kernel"},
        {"quantization_config": {"quant_method": "user/elsewhere"}},
        {"auto_map": {"AutoConfig": "user/elsewhere--own.C"}},
    ],
)
def test_a_folder_cannot_make_a_connection(tmp_path: Path, no_network: list[str], changes: Any) -> None:
    folder = with_config(saved(build_lm("llama"), tmp_path), **changes)
    with suppress(ModelError):
        load(folder)
    assert not no_network


def test_an_adapter_in_the_folder_cannot_bring_another_model(tmp_path: Path, no_network: list[str]) -> None:
    folder = saved(build_lm("llama"), tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/elsewhere"}))
    assert "adapter_config.json" in message(folder)
    (folder / "config.json").unlink()
    assert "emendo import" in message(folder)
    assert not no_network


@pytest.mark.slow
def test_the_hub_is_only_asked_for_ids(tmp_path: Path, no_network: list[str]) -> None:
    for name in (
        "a/b/c",
        "has space",
        "../up/x/y",
        "~nosuchuser/x",
        "n" * 300,
        "http://x.y/z",
        str(tmp_path / "no"),
    ):
        assert "Cannot load the model" in message(name)
    assert not no_network
    before = hub_constants.HF_HUB_OFFLINE
    assert "user/nothing" in message("user/nothing")
    assert no_network
    assert before == hub_constants.HF_HUB_OFFLINE


# ---------------------------------------------------------------------------------- damaged and odd models


@contextmanager
def loads_or_names(folder: Path) -> Iterator[None]:
    """Fails unless the block succeeds, or ends with an error that names the folder."""
    found = ""
    try:
        yield
    except ModelError as error:
        found = str(error)
    assert not found or str(folder) in found


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"hidden_size": -1},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"hidden_act": "no such function"},
        {"vocab_size": "many"},
        {"rope_parameters": {"rope_type": "no such type"}},
        {"model_type": ["llama"]},
        {"model_type": "no such type"},
        {"architectures": 5},
        {"architectures": [7]},
        {"is_encoder_decoder": "yes"},
        {"id2label": 3},
        {"quantization_config": {"quant_method": "no such method"}},
        {"dtype": "no such dtype"},
    ],
)
def test_a_config_with_an_odd_value(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Either it does not matter, or the error names the model."""
    folder = with_config(saved(build_lm("llama"), tmp_path), **changes)
    with loads_or_names(folder):
        assert load(folder).next_logits(["A b"]).isfinite().all()


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "", "[" * 100_000, '{"a": ' * 50_000, "\x00"])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_file_that_holds_something_else(tmp_path: Path, file: str, text: str) -> None:
    folder = saved(build_lm("llama"), tmp_path)
    (folder / file).write_text(text)
    with loads_or_names(folder):
        load(folder)
        assert file in ("tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 16, b'{"a": 1}'])
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    folder = saved(build_lm("llama"), tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    assert str(folder) in message(folder)


def test_weights_of_other_shapes(tmp_path: Path) -> None:
    folder = with_config(saved(build_lm("llama"), tmp_path), intermediate_size=64)
    assert str(folder) in message(folder)


def test_tensors_that_are_not_loaded_are_named(tmp_path: Path) -> None:
    folder = saved(build_lm("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "value_head.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UnusedWeightsWarning, match=r"1 tensors of .* value_head.weight"):
        load(folder)


def test_a_tokenizer_without_padding_and_end(tmp_path: Path) -> None:
    original = build_lm("llama")
    original.model.generation_config.eos_token_id = None
    original.tokenizer.eos_token = original.tokenizer.pad_token = None
    lm = load(saved(original, tmp_path))
    assert lm.tokenizer.pad_token_id is None
    several = lm.generate(["A", "A longer prompt"], 4)
    assert several == [lm.generate(prompt, 4) for prompt in ("A", "A longer prompt")]
    (record,) = records_for(lm, 1)
    assert len(lm.logits(to_texts(lm, [(record.prompt, record.target)]))[0])


def test_an_empty_vocabulary(tmp_path: Path) -> None:
    folder = saved(build_lm("llama"), tmp_path)
    backend = Tokenizer(BPE())
    backend.save(str(folder / "tokenizer.json"))
    assert "tokenizer" in message(folder)


@pytest.mark.parametrize("device", ["meta", "toaster", "cuda:99", "cpu:-5:3"])
def test_devices_that_cannot_be_used(folder: Path, device: str) -> None:
    with pytest.raises(RequestError, match=f"'{device}' cannot be used"):
        load(folder, device=device)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "file"))
    monkeypatch.setitem(models.BUILT_IN, "made-up", ("gguf", "no-such.gguf"))
    with pytest.raises(StorageError, match="EMENDO_CACHE"):
        load("made-up")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("EMENDO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(StorageError, match="EMENDO_CACHE"):
        cache_folder()


def test_measuring_the_fastest_dtype_takes_no_time_where_bfloat16_is_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """90 GFLOP/s in float32 and 0.1 in bfloat16, on a clock that runs accordingly."""
    clock, product = [0.0], torch.Tensor.__matmul__

    def timed(a: Tensor, b: Tensor) -> Tensor:
        clock[0] += 2 * a.shape[0] * b.numel() / (1e8 if a.dtype == torch.bfloat16 else 9e10)
        return product(a[:1], b)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", timed)
        patch.setattr(devices.time, "perf_counter", lambda: clock[0])
        assert devices.fastest_dtype() == "float32"
    assert clock[0] < 0.3


# ------------------------------------------------------------------------- models that also read images


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 8}
_SIGLIP = {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
_QWEN = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": WIDTH}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
_LINEAR = {f"linear_{part}_head_dim": 8 for part in ("key", "value")} | {
    f"linear_num_{part}_heads": 2 for part in ("key", "value")
}
MULTIMODAL: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # config of the text part and of the vision part
    "gemma3": ({"sliding_window": 8}, _SIGLIP),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **_SIGLIP}),
    "qwen2_5_vl": (_ROPE, _QWEN),
    "qwen3_vl": (_ROPE, {**_QWEN, "deepstack_visual_indexes": [1]}),
    "qwen3_5": ({"layer_types": ["linear_attention", "full_attention"] * 2, **_LINEAR}, _QWEN),
}


def build_multimodal(kind: str) -> LM:
    text, vision = MULTIMODAL[kind]
    config = AutoConfig.for_model(kind, text_config={**_TEXT, **text}, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    return LM(model.eval().requires_grad_(False), build_tokenizer(), f"tiny-{kind}")


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_model_of_images_and_text_is_loaded_whole(kind: str, tmp_path: Path) -> None:
    original = build_multimodal(kind)
    folder = saved(original, tmp_path)
    lm = load(folder)
    assert lm.kind == "causal"
    assert type(lm.model) is type(original.model)
    assert fingerprint(lm.model) == fingerprint(original.model)
    files = load_file(folder / "model.safetensors").keys()
    assert any("vis" in name for name in files)
    lm.model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == files
    text = to_texts(lm, [("The capital is", "Paris")])
    assert lm.logits(text)[0].isfinite().all()
    assert lm.context == CONTEXT
    assert isinstance(lm.generate("The capital is", 3), str)
