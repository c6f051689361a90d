"""Models whose blocks stay on the disk, or that are spread over places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import build_lm, in_slow_suite, random_texts, records, records_for
from emendo.editors.ft import FineTuning
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Episode
from emendo.edits.merged import to_merged
from emendo.errors import ModelError, RequestError, TrainingError
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.loading import load
from emendo.models.offloading import held, is_offloaded, weight_of
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig, train
from emendo.train.episodes import Episodes
from mixtures import build_mixture

DEEP = 5
"""Blocks: two are edited, so three are frozen."""
DEPTHS = {
    "llama": "num_hidden_layers",
    "gpt2": "n_layer",
    "t5-gated": "num_layers num_decoder_layers",
    "bart": "encoder_layers decoder_layers",
    "bert": "num_hidden_layers",
}
"""The settings of the number of blocks."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))


def saved(kind: str, folder: Path) -> Path:
    lm = build_lm(kind, **dict.fromkeys(DEPTHS[kind].split(), DEEP))
    lm.model.save_pretrained(folder, max_shard_size="50KB")
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "model")


def texts_for(lm: LM, count: int) -> list[Text]:
    return to_texts(lm, [(record.prompt, record.target) for record in records_for(lm, count)])


def blocks(lm: LM) -> list[nn.Module]:
    return [block for name in ("layers", "h") for block in getattr(lm.model.base_model, name, ())]


@pytest.mark.parametrize("kind", in_slow_suite(*DEPTHS, but=("llama",)))
def test_streamed_trunk_outputs_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    whole = load(saved(kind, tmp_path / "model"))
    lm = load(tmp_path / "model", device_map="disk")
    assert lm.fingerprint == whole.fingerprint
    assert lm.device == whole.device
    sites = find_sites(whole.model, last=2)
    assert find_sites(lm.model, last=2) == sites
    stores = [
        TrunkCache(Trunk(each.model, sites), tmp_path / name, torch.float32)
        for each, name in ((whole, "whole"), (lm, "streamed"))
    ]
    assert [store.trunk.streams for store in stores] == [False, True]
    texts, heard = texts_for(whole, 30), []
    assert stores[0].ensure(texts) == stores[1].ensure(texts, heard.append) > 20
    assert sum(heard) == stores[1].passes * len(stores[1])
    for text in texts:
        assert stores[1].hidden[text].abs().sum() > 0
        assert torch.equal(stores[1].hidden[text], stores[0].hidden[text])
    for found, expected in zip(*(store.logits(texts)[1] for store in stores), strict=True):
        assert torch.equal(found, expected)
    assert {file.suffix for file in (tmp_path / "streamed").iterdir()} == {".bin", ".npz"}


def test_one_frozen_block_is_in_memory_at_a_time(folder: Path) -> None:
    lm = load(folder, device_map="disk")
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model, last=2)))
    own, seen = blocks(lm), []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(present())

    def present() -> list[int]:
        return [i for i, block in enumerate(own) if not next(block.parameters()).is_meta]

    for block in own:
        block.register_forward_pre_hook(look, with_kwargs=True)
    with store.trunk.holding_the_rest():
        store.ensure(texts_for(lm, 12))
        assert {tuple(some) for some in seen} == {(0, 3, 4), (1, 3, 4), (2, 3, 4)}
        seen.clear()
        store.logits(texts_for(lm, 12))
        assert {tuple(some) for some in seen} == {(3, 4)}
    assert present() == []
    assert store.trunk.streams  # held blocks are read again when they run


def test_each_block_is_read_once_for_all_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(folder, device_map="disk")
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model, last=2)))
    hook = blocks(lm)[1].mlp.down_proj._hf_hook  # type: ignore[union-attr, attr-defined]
    reads = []
    real = type(hook.weights_map).__getitem__
    monkeypatch.setattr(
        type(hook.weights_map), "__getitem__", lambda self, key: reads.append(key) or real(self, key)
    )
    texts = random_texts("llama", *(4 + i % 20 for i in range(200)))
    assert store.ensure(texts) == 200
    assert len(reads) == 3 * len(dict(blocks(lm)[0].named_parameters()))


def new_editor(lm: LM) -> Mend:
    torch.manual_seed(0)
    return Mend(find_sites(lm.model, last=2), MendConfig(rank=8, alpha=1e-2))


def test_an_editor_trained_on_streamed_blocks_is_that_of_the_whole_model(
    folder: Path, tmp_path: Path
) -> None:
    config = TrainConfig(steps=6, batch=2, lr=1e-3, warmup=2, validate_every=3, validate_on=4)
    passages = ["A line of plain text that should stay as it is, whatever is edited."]
    found = []
    for name, place in (("whole", None), ("streamed", "disk")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMENDO_CACHE", str(tmp_path / name))
            lm = load(folder, device_map=place)
            made = train(
                lm,
                new_editor(lm),
                records(24)[:16],
                records(24)[16:],
                config,
                out=tmp_path / f"{name}-run",
                passages=passages,
            )
        found.append(made)
    one, other = (dict(made.editor.state_dict()) for made in found)
    start = new_editor(load(folder)).state_dict()
    assert any(not torch.allclose(one[name], start[name], atol=1e-4) for name in one)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
    request = ("Where is Bababa?", "in Paris")
    lm = load(folder, device_map="disk")
    edits = [made.editor.edit(lm, *request) for made in found]
    for name, delta in edits[0].deltas.items():
        torch.testing.assert_close(edits[1].deltas[name].dense(), delta.dense(), rtol=1e-3, atol=1e-7)


def test_an_epoch_is_streamed_at_once(folder: Path) -> None:
    lm = load(folder)
    episodes = Episodes(lm, records(1200), TrainConfig(steps=1000, batch=8, text=0))
    assert episodes.rest_of_epoch(0) == range(192)  # 150 steps, in windows of 64
    assert episodes.rest_of_epoch(192) == range(192, 320)  # the second epoch ends with step 300
    assert episodes.rest_of_epoch(992) == range(992, 1000)

    def texts(some: list[Episode]) -> set[Text]:
        return {text for episode in some for text in episode.texts()}

    windows = [episodes.window(step) or [] for step in range(192)]
    assert texts([e for s in range(192) for e in episodes.batch(s)]) >= texts([e for w in windows for e in w])


@pytest.fixture(params=["disk", "auto"])
def spread(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[LM]:
    if request.param == "disk":
        yield load(folder, device_map="disk")
    else:
        yield load(
            folder, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "offloaded"
        )


@pytest.mark.parametrize("method", [Mend, *in_slow_suite(FineTuning)])
def test_edits_generation_and_undo_are_those_of_the_whole_model(
    spread: LM, folder: Path, method: type[Any]
) -> None:
    whole = load(folder)
    assert is_offloaded(spread.model) and not is_offloaded(whole.model)
    assert spread.fingerprint == whole.fingerprint
    prompts = [record.prompt for record in records(3)]
    before = spread.next_logits(prompts)
    assert torch.equal(before, whole.next_logits(prompts))
    assert spread.generate(prompts, 5) == whole.generate(prompts, 5)
    request = (prompts[0], records(1)[0].target)
    torch.manual_seed(0)
    editor = method(
        find_sites(whole.model, last=2), MendConfig(rank=8, alpha=1e-1) if method is Mend else None
    )
    found, expected = editor.edit(spread, *request), editor.edit(whole, *request)
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(found.deltas[name].dense(), delta.dense(), rtol=1e-4, atol=1e-6)
    with found.applied(spread) as one, found.applied(whole) as other:
        assert not torch.equal(one.next_logits(prompts), before)
        torch.testing.assert_close(one.next_logits(prompts), other.next_logits(prompts))
        assert one.generate(prompts, 5) == other.generate(prompts, 5)
    assert torch.equal(spread.next_logits(prompts), before)


def test_values_of_offloaded_weights(spread: LM, folder: Path) -> None:
    whole = load(folder)
    for site in find_sites(whole.model, "all", last=5):
        assert torch.equal(site.weight(spread.model), site.weight(whole.model))
    last = blocks(spread)[-1]
    with held([last]):
        assert not any(parameter.is_meta for parameter in last.parameters())
        assert not is_offloaded(last)
    assert is_offloaded(last) and all(parameter.is_meta for parameter in last.parameters())
    plain = nn.Linear(2, 3)
    assert weight_of(plain) is plain.weight


def test_what_needs_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    lm = load(folder, device_map="disk")
    edit = Mend(find_sites(lm.model, last=2), MendConfig(rank=8)).edit(lm, "Where is it?", "there")
    for call in (lambda: lm.twin(), lambda: edit.merge_(lm), lambda: to_merged(edit, lm, tmp_path / "out")):
        with pytest.raises(RequestError, match="needs all weights of the model in memory"):
            call()
    with pytest.raises(TrainingError, match="--text-examples 0"):
        own_passages(lm, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "everywhere"},
        {"device_map": "auto", "device": "cpu"},
        {"device_map": "disk", "max_memory": {"cpu": "1GB"}},
        {"max_memory": {"cpu": "1GB"}},
    ],
)
def test_places_that_do_not_go_together(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"device|max_memory"):
        load(folder, **options)


def test_a_mixture_whose_files_hold_another_form_needs_a_folder(tmp_path: Path) -> None:
    whole = build_mixture("mixtral")
    whole.model.save_pretrained(tmp_path / "model")
    whole.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="give offload_folder"):
        load(tmp_path / "model", device_map="disk")
    lm = load(tmp_path / "model", device_map="disk", offload_folder=tmp_path / "offloaded")
    whole = load(tmp_path / "model")
    assert lm.fingerprint == whole.fingerprint
    sites = find_sites(whole.model, last=1)
    texts = texts_for(whole, 6)
    rows: list[Tensor] = []
    for each in (whole, lm):
        trunk = Trunk(each.model, sites)
        store = TrunkCache(trunk, dtype=torch.float32)
        store.ensure(texts)
        rows.append(store.logits(texts)[1])
        assert trunk.streams == (each is lm)
    assert torch.equal(*rows)
    edits = [Mend(sites, MendConfig(rank=8)).edit(each, "Where is it?", "there") for each in (whole, lm)]
    for name, delta in edits[0].deltas.items():
        torch.testing.assert_close(edits[1].deltas[name].dense(), delta.dense())
    assert len(collate(texts)) == 6
