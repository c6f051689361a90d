"""The tables on the paper's own models: tiny folders of their classes, and records in the layouts of their files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduction.mend_paper import real
from reproduction.mend_paper.budgets import PAPER_TASKS, Choice
from reproduction.mend_paper.cells import Cell
from reproduction.mend_paper.convert import convert
from reproduction.mend_paper.presets import build
from reproduction.mend_paper.tasks import task
from transformers import BertModel

from cases import WIDTH, build_lm
from cli.samples import Emendo
from emendo import load
from emendo.errors import DataError, ModelError
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.train.presets import MODELS

EDITORS = ("mend", "ft-kl")
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "distilgpt2": ("gpt2", {"n_layer": 6, "n_positions": 512}),
    "gpt-neo-2.7b": (
        "gpt_neo",
        {"num_layers": 32, "attention_types": [[["global", "local"], 16]], "max_position_embeddings": 512},
    ),
    "gpt-j-6b": ("gptj", {"n_layer": 28, "n_positions": 512}),
    "t5-xl": ("t5-gated", {"num_layers": 24}),
    "t5-xxl": ("t5-gated", {"num_layers": 24}),
}
"""Kind and depth of the models that come from the hub."""
PASSAGE = " ".join(["the capital of Bade is Paris and it lies in the north of a large country"] * 7)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def question(number: int) -> dict[str, Any]:
    return {
        "input": f"Where was person {number} born?",
        "output": [{"answer": "Rome"}],
        "prediction": "Oslo",
        "alternatives": ["Paris", "Lima"] if number else [],
        "filtered_rephrases": [f"In which town was person {number} born?", f"Birthplace of {number}?"],
    }


def claim(number: int) -> dict[str, Any]:
    said = "SUPPORTS" if number % 2 else "REFUTES"
    return {
        "id": number,
        "input": f"Person {number} was born in Rome.",
        "output": [{"answer": said}],
        "prediction": said,
        "alternatives": ["REFUTES" if number % 2 else "SUPPORTS"],
        "filtered_rephrases": [f"Rome is the birthplace of person {number}."],
        "logit": 0.5,
    }


def bert_state(base: Path) -> dict[str, Any]:
    """A state as ``FC_model.ckpt`` holds it."""
    body = BertModel.from_pretrained(base).state_dict()
    classifier = {"classifier.weight": torch.randn(1, WIDTH), "classifier.bias": torch.randn(1)}
    return {**{f"model.{name}": tensor for name, tensor in body.items()}, **classifier}


def saved(folder: Path, kind: str, **config: Any) -> Path:
    lm = build_lm(kind, **config)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders and checkpoints that the two converted models are made of."""
    root = tmp_path_factory.mktemp("bases")
    bert = saved(root / "bert", "bert", num_hidden_layers=12)
    torch.save(bert_state(bert), root / "FC_model.ckpt")
    bart = saved(root / "bart", "bart", encoder_layers=6, decoder_layers=6)
    state = load(bart).model.state_dict()
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, root / "QA_model.ckpt")
    return root


@pytest.fixture(scope="module")
def data(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``--data``."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("train", 14), ("dev", 8)):
        lines(
            root / f"zsre/structured_zeroshot-{part}-new_annotated_final.jsonl",
            [question(i) for i in range(count)],
        )
        lines(root / f"fever/fever-{part}-kilt.jsonl", [claim(i) for i in range(count)])
    (root / "nq").mkdir()
    for name in ("train", "validation"):
        asked = {"questions": [f"Who wrote book {i}?" for i in range(9)], "answers": ["Ada"] * 9}
        (root / f"nq/{name}.json").write_text(json.dumps(asked))
    sampled = root / "10token/data/self_sample"
    sampled.mkdir(parents=True)
    for name in ("train", "valid"):
        passages = [f"person {i} was born in the capital of Bade" for i in range(10)]
        completions = [f"{text} and lives there" for text in passages]
        whole = {"n_tokens": 10, "original": passages, "completions": completions}
        (sampled / f"{name}.json").write_text(json.dumps(whole))
    (root / "wikitext-103").mkdir()
    texts = "\n".join(["= A heading =", PASSAGE, f"one {PASSAGE}", f"two {PASSAGE}", f"é {PASSAGE}"])
    for name in ("wikitext-103/train.txt", "wikitext-103/valid.txt", "openwebtext.txt"):
        (root / name).write_text(texts, encoding="utf-8")
    for name, (kind, config) in SIZES.items():
        saved(root / "models" / name, kind, **config)
    convert("bert-base", bases / "FC_model.ckpt", root / "models/bert-base", bases / "bert")
    convert("bart-base", bases / "QA_model.ckpt", root / "models/bart-base", bases / "bart")
    return root


def cells_of(name: str) -> Iterator[Cell]:
    for cell in build(name, Choice()).cells.values():
        assert isinstance(cell, Cell)
        yield cell


@pytest.mark.parametrize("name", real.TABLES)
def test_a_table_has_the_settings_of_the_paper(name: str) -> None:
    preset = build(name, Choice())
    columns = {column.name for column in preset.columns}
    for (row, column), cell in preset.cells.items():
        assert isinstance(cell, Cell)
        assert row in preset.rows and column in columns
        cell.plan()
        model = MODELS[PAPER_TASKS[cell.task]]
        assert cell.sites == ("attention" if row == "MEND, attention" else model.sites)
        assert cell.dtype == model.dtype
        assert cell.editor != "enn" or model.enn
        if cell.trained:
            config = cell.train_config()
            assert (config.c_edit, config.prompt_share, config.clip) == (0.1, 0, 100)
            assert config.steps == 50_000 or cell.k > 5
    for row, figures in preset.paper.items():
        assert row in preset.rows
        here = {column.paper or column.name for column in preset.columns}
        assert figures.keys() <= here


def test_fine_tuning_has_the_rates_of_the_paper() -> None:
    rates = {
        (cell.task, cell.editor): (cell.config().lr, getattr(cell.config(), "c_edit", None))
        for name in ("paper-table3", "paper-table4")
        for cell in cells_of(name)
        if cell.editor in ("ft", "ft-kl")
    }
    assert rates["wikitext-gpt-j-6b", "ft"] == (5e-6, None)
    assert rates["wikitext-gpt-j-6b", "ft-kl"] == (5e-6, 1e-3)
    assert rates["zsre-t5-xxl", "ft-kl"] == (1e-4, 1e-2)
    assert rates["fever-bert-base", "ft"] == (1e-6, None)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_data_of_a_task(name: str, data: Path) -> None:
    found = task(name, data=data)
    assert Path(found.model) == data / "models" / PAPER_TASKS[name]
    assert found.train and found.validation and found.test
    prompts = {record.prompt for record in (*found.train, *found.validation)}
    assert len(prompts) == len(found.train) + len(found.validation)  # nothing twice
    for record in (*found.train, *found.validation, *found.test):
        assert record.paraphrases
        assert all(probe.prompt != record.prompt for probe in record.unrelated)
        if name.startswith("zsre"):
            assert record.target in ("Paris", "Lima")
            asked = {probe.answer for probe in record.unrelated}
            assert len(record.unrelated) == 4 and asked == ({"Ada"} if "t5" in name else {"Rome"})
    if name.startswith("wikitext"):
        assert found.test[0].target == " and lives there"
        assert found.passages and found.test_passages
        assert all(50 <= len(text.split()) <= 100 and text.isascii() for text in found.passages)
        assert name == "wikitext-distilgpt2" or not set(found.passages) & set(found.test_passages)


def test_a_model_folder_that_is_not_there(data: Path, tmp_path: Path) -> None:
    assert real.model_of("zsre-t5-xl", tmp_path) == "google/t5-xl-ssm-nq"
    with pytest.raises(DataError, match=r"reproduction\.mend_paper\.convert bart-base"):
        real.model_of("zsre-bart-base", tmp_path)
    with pytest.raises(DataError, match=r"reads fever/fever-train-kilt\.jsonl, but .* does not hold it"):
        task("fever-bert-base", data=tmp_path)


@torch.no_grad()
def test_the_converted_fact_checker_gives_the_probability_of_the_single_logit(
    bases: Path, data: Path
) -> None:
    lm = load(data / "models" / "bert-base")
    assert lm.labels == ("REFUTES", "SUPPORTS")
    state = torch.load(bases / "FC_model.ckpt")
    inputs = lm.tokenizer(["Person 3 was born in Rome."], return_tensors="pt")
    pooled = BertModel.from_pretrained(bases / "bert").eval()(**inputs).pooler_output
    logit = pooled @ state["classifier.weight"].T + state["classifier.bias"]
    found = lm.model(**inputs).logits.softmax(-1)[:, 1:]
    torch.testing.assert_close(found, logit.sigmoid(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_converted_answerer_reads_no_begin_of_text(bases: Path, data: Path) -> None:
    lm = load(data / "models" / "bart-base")
    (text,) = to_texts(lm, [("Where was person 3 born?", "Rome")])
    rome = tuple(lm.tokenizer("Rome", add_special_tokens=False)["input_ids"])
    assert lm.begins == (2,)
    assert text.ids == (2, *rome, 2) and text.start == 1
    source = lm.tokenizer(["Where was person 3 born?"], return_tensors="pt")["input_ids"]
    inputs = {"input_ids": source, "decoder_input_ids": torch.tensor([[2, *rome]])}
    found = next(iter(lm.logits([text])))
    torch.testing.assert_close(found, load(bases / "bart").model(**inputs).logits[0], rtol=1e-4, atol=1e-4)
    assert len(find_sites(lm.model, MODELS["bart-base"].sites)) == 8


def test_a_checkpoint_of_another_model_is_refused(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no classifier with a single logit"):
        convert("bert-base", bases / "QA_model.ckpt", tmp_path / "out", bases / "bert")
    with pytest.raises(ModelError, match=r"does not fit: it lacks \d+ tensors"):
        convert("bart-base", bases / "FC_model.ckpt", tmp_path / "out", bases / "bart")
    assert not (tmp_path / "out").exists()


def made(emendo_command: Emendo, data: Path, out: Path, *names: str, editors: str, tasks: str = "") -> None:
    presets = [word for name in names for word in ("--preset", name)]
    own = ("--data", data, "--out", out, "--scale", "4e-5", "--editors", editors)
    emendo_command("compare", *presets, *own, *(("--tasks", tasks) if tasks else ()))


@pytest.mark.slow
def test_a_column_of_a_table(emendo_command: Emendo, data: Path, tmp_path: Path) -> None:
    made(emendo_command, data, tmp_path, "paper-table4", editors="ft,mend", tasks="zsre-bart-base")
    page = (tmp_path / "compare.md").read_text()
    assert ">0.99" in page and "Small models of the paper (Table 4)" in page
    assert len(list((tmp_path / "cells").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in real.TABLES if name != "paper-table5"]
)  # 125 facts in one edit
def test_a_table(name: str, emendo_command: Emendo, data: Path, tmp_path: Path) -> None:
    made(emendo_command, data, tmp_path, name, editors=",".join(EDITORS))
    page = (tmp_path / "compare.md").read_text()
    preset = build(name, Choice(editors=EDITORS))
    assert preset.title in page
    shared = sum(
        row == "Running statistics" for row, _ in preset.cells
    )  # the default: the cell of the row "MEND"
    assert len(list((tmp_path / "cells").iterdir())) == len(preset.cells) - shared
