"""GGUF adapters, read back with the gguf package; names and orders are those that transformers knows of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as reference

from cases import build_lm
from edits.test_peft import an_edit
from emendo.edits import to_gguf, to_merged_gguf
from emendo.errors import ModelError, RequestError, StorageError
from emendo.low_rank import LowRank
from emendo.models.lm import LM

KINDS = {"llama": "llama", "gpt2": "gpt2"}


def read(file: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def in_the_models_order(lm: LM, change: Tensor, name: str) -> Tensor:
    """A change by llama.cpp, in the order of transformers."""
    kind, config = lm.model.config.model_type, lm.model.config
    processor = reference.TENSOR_PROCESSORS.get(kind, reference.TensorProcessor)(config=config.to_dict())
    if kind != "llama":
        return change
    return torch.as_tensor(processor.process(change.numpy(), name=f"{name}.weight").weights)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_holds_the_edit_under_the_names_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    lm = build_lm(kind)
    edit = an_edit(lm)
    if kind == "llama":
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "o_proj"):
            site = f"model.layers.1.self_attn.{name}"
            d_out, d_in = lm.model.get_submodule(site).weight.shape
            edit.deltas[site] = LowRank(torch.randn(d_out, 3), torch.randn(3, d_in))  # type: ignore[index]
    adapter = to_gguf(edit, lm, tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert adapter.rank == edit.rank and adapter.error == 0
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == KINDS[kind]
    scale = fields["adapter.lora.alpha"] / adapter.rank  # type: ignore[operator]
    names = reference.get_gguf_hf_weights_map(lm.model, reference.TensorProcessor())
    found = {}
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        change = scale * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        site = names[name].removesuffix(".weight")
        found[site] = in_the_models_order(lm, change, name.removesuffix(".weight"))
    assert found.keys() == edit.deltas.keys()
    for site, delta in edit.deltas.items():
        torch.testing.assert_close(found[site], delta.dense(), rtol=1e-4, atol=1e-5)


def test_the_rank_can_be_cut(tmp_path: Path) -> None:
    lm = build_lm("llama")
    edit = an_edit(lm)
    adapter = to_gguf(edit, lm, tmp_path / "a.gguf", max_rank=2)
    assert adapter.rank == 2 and 0 < adapter.error < 1
    assert {min(tensor.shape) for tensor in read(tmp_path / "a.gguf")[1].values()} == {2}


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    lm = build_lm("gptj")
    with pytest.raises(ModelError, match="not for a model of type 'gptj'"):
        to_gguf(an_edit(lm), lm, tmp_path / "a.gguf")
    lm = build_lm("llama")
    edit = an_edit(lm)
    d_out, d_in = lm.model.lm_head.weight.shape
    edit.deltas["lm_head"] = LowRank(torch.randn(d_out, 1), torch.randn(1, d_in))  # type: ignore[index]
    lm.model.config.tie_word_embeddings = True
    with pytest.raises(ModelError, match="no matrix of its own for lm_head"):
        to_gguf(edit, lm, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_only_an_older_adapter_is_replaced(tmp_path: Path) -> None:
    lm = build_lm("llama")
    edit = an_edit(lm)
    to_gguf(edit, lm, tmp_path / "a.gguf", max_rank=1)
    assert to_gguf(edit, lm, tmp_path / "a.gguf").rank == edit.rank
    (tmp_path / "model.gguf").write_bytes(b"GGUF and the weights of a model")
    with pytest.raises(StorageError, match="never replaced"):
        to_gguf(edit, lm, tmp_path / "model.gguf")


def test_a_merged_model_is_made_by_the_converter_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_lm("llama")
    edit = an_edit(lm)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"convert_hf_to_gguf\.py, which is not on the PATH"):
        to_merged_gguf(edit, lm, tmp_path / "model.gguf")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder, _, out = sys.argv[1:]\n"
        "names = sorted(path.name for path in pathlib.Path(folder).iterdir())\n"
        "pathlib.Path(out).write_text(' '.join(names))\n",
        encoding="utf-8",
    )
    script.chmod(0o755)
    assert to_merged_gguf(edit, lm, tmp_path / "model.gguf").loss >= 0
    assert "model.safetensors" in (tmp_path / "model.gguf").read_text(encoding="utf-8")
    script.write_text("raise SystemExit('this architecture is unknown')", encoding="utf-8")
    with pytest.raises(ModelError, match="this architecture is unknown"):
        to_merged_gguf(edit, lm, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()
