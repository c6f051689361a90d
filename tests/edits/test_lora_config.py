"""Adapters with every option of the installed PEFT: imported with the effect that PEFT gives them, or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from cases import build_lm, records, unchanged
from emendo.edits import from_peft
from emendo.edits._lora_config import IGNORED, OFF, READ
from emendo.errors import EmendoError, MismatchError, RequestError, StorageError
from emendo.models.lm import LM

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of many of these options

PROMPTS = [record.prompt for record in records(3)]
PLAIN = {"r": 4, "lora_alpha": 12, "target_modules": ["up_proj", "down_proj", "q_proj"]}

SAME: dict[str, dict[str, Any]] = {
    "plain": {},
    "r": {"r": 3},
    "lora_alpha": {"lora_alpha": 1},
    "use_rslora": {"use_rslora": True},
    "rank_pattern, an end": {"rank_pattern": {"down_proj": 2}},
    "rank_pattern, a regular expression": {"rank_pattern": {r"model\.layers\.[12]\..*": 2, "up_proj": 5}},
    "alpha_pattern, an end": {"alpha_pattern": {"down_proj": 64}},
    "alpha_pattern, a regular expression": {"alpha_pattern": {r"layers\.1\..*": 64, r".*q_pro.": 1}},
    "alpha_pattern, part of a name": {"alpha_pattern": {"proj": 64, "layers": 64, r"1\..*": 32}},
    "alpha_pattern, the first match": {"alpha_pattern": {r"layers\..*": 3, r"layers\.1\..*": 64}},
    "patterns and use_rslora": {
        "use_rslora": True,
        "rank_pattern": {r".*\.2\..*": 8},
        "alpha_pattern": {"up_proj": 9},
    },
    "target_modules, a regular expression": {"target_modules": r".*\.(0|3)\.mlp\.(up|down)_proj"},
    "target_modules, whole names": {"target_modules": ["model.layers.0.mlp.up_proj", "2.mlp.up_proj"]},
    "target_modules, all-linear": {"target_modules": "all-linear"},
    "exclude_modules, a list": {"exclude_modules": ["q_proj", "model.layers.0.mlp.up_proj"]},
    "exclude_modules, a regular expression": {"exclude_modules": r".*layers\.[01]\..*"},
    "layers_to_transform": {"layers_to_transform": [1, 3]},
    "layers_to_transform, one": {"layers_to_transform": 2},
    "layers_to_transform, none": {"layers_to_transform": []},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers_pattern, a list": {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "modules_to_save": {"modules_to_save": ["model.norm"]},  # saved, and not trained
    "task_type": {"task_type": "CAUSAL_LM"},
    "revision": {"revision": "main"},
    "lora_dropout": {"lora_dropout": 0.5},
    "inference_mode": {"inference_mode": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "base_model_name_or_path": {"base_model_name_or_path": "some/model"},
    "megatron_core": {"megatron_core": "other.core"},
    "qalora_group_size": {"qalora_group_size": 8},
    "init False": {"init_lora_weights": False},
    "init gaussian": {"init_lora_weights": "gaussian"},
    "init orthogonal": {"init_lora_weights": "orthogonal"},
    "init mica": {"init_lora_weights": "mica"},
    "init eva": {"init_lora_weights": "eva"},
}
"""Adapters that an edit can be; each option that is read or ignored has one."""

REFUSED: dict[str, Any] = {
    "bias": "all",
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1, 2],
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [5],
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["mlp.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1e-4},
    "peft_type": "LOHA",
}


def save_adapter(folder: Path, options: dict[str, Any]) -> Tensor:
    """An adapter with random factors that PEFT saves; returns the logits that PEFT gives it when it loads it again."""
    lm = build_lm("llama")
    wrapped = get_peft_model(lm.model, LoraConfig(**{**PLAIN, **options}))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(str(folder))
    other = build_lm("llama")
    PeftModel.from_pretrained(other.model, str(folder)).eval()
    return other.next_logits(PROMPTS).detach()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    save_adapter(folder, {})
    return folder


@pytest.fixture
def plain(saved: Path, tmp_path: Path) -> Path:
    """An adapter without any option, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "plain"))


@pytest.mark.slow
@pytest.mark.parametrize("options", SAME.values(), ids=SAME.keys())
def test_an_imported_adapter_has_the_effect_that_peft_gives_it(
    tmp_path: Path, tiny_llama: LM, options: dict[str, Any]
) -> None:
    expected = save_adapter(tmp_path / "adapter", options)
    edit = from_peft(tmp_path / "adapter", tiny_llama)
    with unchanged(tiny_llama.model), edit.applied(tiny_llama):
        torch.testing.assert_close(tiny_llama.next_logits(PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert (expected - tiny_llama.next_logits(PROMPTS)).abs().max() > 0.05


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_does_more_is_refused(plain: Path, tiny_llama: LM, name: str) -> None:
    from_peft(plain, tiny_llama)
    change(plain, **{name: REFUSED[name]})
    with pytest.raises(RequestError, match=f"{REFUSED[name]!r}" if name == "peft_type" else name):
        from_peft(plain, tiny_llama)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "new", 3, 1]
)
def test_an_initialisation_that_may_change_the_base_weights_is_refused(
    plain: Path, tiny_llama: LM, init: Any
) -> None:
    change(plain, init_lora_weights=init)
    with pytest.raises(RequestError, match="init_lora_weights"):
        from_peft(plain, tiny_llama)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_such_an_initialisation_does_change_the_base_weights(tmp_path: Path, init: str) -> None:
    """The reason why it is refused: PEFT subtracts the initial factors from the base weights when it loads."""
    expected = save_adapter(tmp_path, {"init_lora_weights": init})
    change(tmp_path, init_lora_weights=True)
    lm = build_lm("llama")
    with from_peft(tmp_path, lm).applied(lm):
        assert (lm.next_logits(PROMPTS) - expected).abs().max() > 0.1


def test_every_option_of_the_installed_peft_is_known() -> None:
    """A new option fails here, until its meaning is looked up and it is read, ignored or required to be off."""
    options = {field.name for field in dataclasses.fields(LoraConfig)}
    known = {*READ, *IGNORED, *OFF}
    assert options <= known, sorted(options - known)
    assert len(known) == len(READ) + len(IGNORED) + len(OFF)
    tested = {name for values in SAME.values() for name in values} | REFUSED.keys() | {"init_lora_weights"}
    untested = {"auto_mapping", "peft_version", "runtime_config"}  # descriptions, and where factors are kept
    by_method = {
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }  # settings of initialisations
    always = {"target_modules", "r", "lora_alpha"}
    assert options - tested - untested - by_method - always == set()
    for name, value in dataclasses.asdict(LoraConfig(target_modules=["a"])).items():
        if name in OFF:
            assert value is None or value in OFF[name], name  # the default is off


@pytest.mark.parametrize(
    ("value", "refused"), [(None, False), (False, False), ([], False), (1, True), ("a", True)]
)
def test_an_unknown_option_must_be_off(plain: Path, tiny_llama: LM, value: Any, refused: bool) -> None:
    change(plain, of_a_later_version=value)
    if refused:
        with pytest.raises(RequestError, match="of_a_later_version"):
            from_peft(plain, tiny_llama)
    else:
        from_peft(plain, tiny_llama)


UP = "base_model.model.model.layers.0.mlp.up_proj"


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        edit(found)
        save_file(found, folder / "adapter_model.safetensors")

    return damage


def put(**new: Tensor) -> Callable[[Path], None]:
    return tensors(lambda old: old.update({f"{UP}.lora_{side}.weight": t for side, t in new.items()}))


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, **values)


BAD: dict[str, tuple[Callable[[Path], None], type[EmendoError], str]] = {
    "no lora_B": (tensors(lambda t: t.pop(f"{UP}.lora_B.weight")), StorageError, "only one of"),
    "no lora_A": (tensors(lambda t: t.pop(f"{UP}.lora_A.weight")), StorageError, "only one of"),
    "NaN": (put(A=torch.full((4, 32), float("nan"))), StorageError, "NaN"),
    "infinity": (put(B=torch.full((48, 4), float("inf"))), StorageError, "NaN or infinite"),
    "int8": (put(A=torch.ones(4, 32).char(), B=torch.ones(48, 4).char()), StorageError, "int8"),
    "3-D": (put(A=torch.ones(4, 32, 1), B=torch.ones(48, 4, 1)), StorageError, "damaged"),
    "rank 0": (put(A=torch.ones(0, 32), B=torch.ones(48, 0)), StorageError, "damaged"),
    "another rank": (put(A=torch.ones(3, 32), B=torch.ones(48, 3)), StorageError, "has rank 3"),
    "another width": (put(A=torch.ones(4, 64), B=torch.ones(96, 4)), MismatchError, "96 x 64"),
    "no prefix": (
        tensors(lambda t: t.update({k.removeprefix("base_model.model."): t.pop(k) for k in list(t)})),
        RequestError,
        "base_model.model.",
    ),
    "nothing": (tensors(lambda t: t.clear()), StorageError, "no lora_A"),
    "an unknown module": (
        tensors(
            lambda t: t.update(
                {k.replace("layers.0", "layers.9"): v.clone() for k, v in list(t.items()) if UP in k}
            )
        ),
        MismatchError,
        "layers.9",
    ),
    "a bias": (tensors(lambda t: t.update({f"{UP}.bias": torch.ones(48)})), RequestError, "bias"),
    "a module that is not selected": (config(target_modules=["q_proj"]), RequestError, "ignore them"),
    "r 0": (config(r=0), StorageError, "r=0"),
    "r true": (config(r=True), StorageError, "r=True"),
    "lora_alpha null": (config(lora_alpha=None), StorageError, "lora_alpha=None"),
    "lora_alpha NaN": (config(lora_alpha=float("nan")), StorageError, "lora_alpha=nan"),
    "lora_alpha a text": (config(lora_alpha="12"), StorageError, "lora_alpha"),
    "patterns that are a list": (config(rank_pattern=["a"]), StorageError, "rank_pattern"),
    "a pattern without a number": (config(alpha_pattern={"a": None}), StorageError, "alpha_pattern"),
    "no regular expression": (config(alpha_pattern={"(": 1}), StorageError, "regular expression"),
    "no regular expression of targets": (config(target_modules="*"), StorageError, "regular expression"),
    "targets null": (config(target_modules=None), StorageError, "target_modules"),
    "targets of numbers": (config(target_modules=[1]), StorageError, "target_modules"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]") and None, StorageError, "no object"),
    "deep": (lambda f: (f / "adapter_config.json").write_text("[" * 10**5) and None, StorageError, "damaged"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), StorageError, "does not exist"),
}


@pytest.mark.parametrize(("damage", "error", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_adapter_is_named(
    plain: Path, tiny_llama: LM, damage: Callable[[Path], None], error: type[EmendoError], words: str
) -> None:
    damage(plain)
    with pytest.raises(error, match=words):
        from_peft(plain, tiny_llama)


def test_factors_of_half_precision_are_scaled_as_peft_scales_them(tmp_path: Path, tiny_llama: LM) -> None:
    save_adapter(tmp_path, {"lora_alpha": 7})
    tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))(tmp_path)
    other = build_lm("llama")
    PeftModel.from_pretrained(other.model, str(tmp_path)).eval()
    with from_peft(tmp_path, tiny_llama).applied(tiny_llama):
        found = tiny_llama.next_logits(PROMPTS)
    torch.testing.assert_close(found, other.next_logits(PROMPTS), rtol=1e-5, atol=1e-5)
