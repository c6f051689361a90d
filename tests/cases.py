"""What the tests run on: tiny random models with a tokenizer made in code, made-up records, and the editors.

Everything is built from configs and seeds; nothing is downloaded, and nothing is built at import.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from architectures import (
    ARCHITECTURES,
    BEGIN,
    CLASSES,
    CONTEXT,
    DEPTH,
    END,
    HEADS,
    INNER,
    PAD,
    VOCABULARY,
    WIDTH,
    build_model,
    of_kind,
)
from emendo.data import Probe, Record
from emendo.models.lm import LM
from emendo.models.sites import Kind
from emendo.models.text import Text, TokenBatch

__all__ = [
    "ARCHITECTURES",
    "BEGIN",
    "CLASSES",
    "CONTEXT",
    "DEPTH",
    "EDITOR_CASES",
    "END",
    "HEADS",
    "INNER",
    "PAD",
    "VOCABULARY",
    "WIDTH",
    "EditorCase",
    "Recorded",
    "build_lm",
    "build_model",
    "build_tokenizer",
    "in_slow_suite",
    "of_kind",
    "plain_logits",
    "random_texts",
    "records",
    "records_for",
    "unchanged",
]


def in_slow_suite(*values: object, but: Container[object] = ()) -> list[object]:
    """Values of a parameter, or tuples for several, that are tested in the slow suite, apart from some."""
    return [
        value
        if value in but
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


class Recorded:
    """A progress display that keeps what it is given."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int]] = []
        self.figures: dict[str, Mapping[str, float]] = {}
        self.reports: list[tuple[str, Mapping[str, float]]] = []

    def update(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        self.updates.append((task, done, total))
        self.figures[task] = figures or {}

    def report(self, heading: str, figures: Mapping[str, float], remark: str = "") -> None:
        self.reports.append((heading, figures))


def build_tokenizer(kind: str = "llama", *, bos: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, dressing texts as the architecture asks.

    With `bos` a decoder's puts a token before every text. Each call gives a copy.
    """
    return deepcopy(_train_tokenizer(kind, bos))


@cache
def _train_tokenizer(kind: str, bos: bool) -> PreTrainedTokenizerBase:
    known = ARCHITECTURES[kind]
    template = f"{BEGIN} $A" if bos else known.template
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(known.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"{text} {record.target}" for record in records(32) for text in (record.prompt, *record.paraphrases)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    if template != "$A":
        used = [(token, tokenizer.token_to_id(token)) for token in known.special if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN if BEGIN in known.special else None,
        eos_token=END,
        pad_token=PAD if PAD in known.special else END,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_lm(
    kind: str, dtype: torch.dtype = torch.float32, *, bos: bool = False, seed: int = 0, **config: Any
) -> LM:
    """A tiny model with its tokenizer."""
    model = build_model(kind, dtype, seed, **config)
    if ARCHITECTURES[kind].kind == "seq2seq" and BEGIN in ARCHITECTURES[kind].special:
        model.generation_config.forced_bos_token_id = 0  # as BART's are
    return LM(model, build_tokenizer(kind, bos=bos), f"tiny-{kind}")


def random_texts(kind: str, *lengths: int) -> list[Text]:
    """Random texts of so many tokens, the last three of them the answer; a classifier's are one class."""
    known = ARCHITECTURES[kind].kind

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (n,)).tolist())

    if known == "classifier":
        return [Text((*tokens(n), i % len(CLASSES)), n) for i, n in enumerate(lengths)]
    if known == "seq2seq":  # the more the encoder reads, the less the decoder
        return [Text(tokens(4 + i % 3), 1 + i % 3, tokens(n)) for i, n in enumerate(lengths)]
    return [Text(tokens(n), n - 3) for n in lengths]


def plain_logits(model: Any, batch: TokenBatch) -> Tensor:
    """The slow reference of every pass: the whole model once, then the rows at the labels `[n, vocabulary]`."""
    if model.get_output_embeddings() is None:
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[batch.owner]
    if batch.source_ids is None:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    else:
        logits = model(
            input_ids=batch.source_ids,
            attention_mask=batch.source_mask,
            decoder_input_ids=batch.input_ids,
            decoder_attention_mask=batch.attention_mask,
        ).logits
    return logits.flatten(0, 1)[batch.positions]


_SYLLABLES = ("ba", "de", "fo", "gu", "ka", "li", "mo", "nu", "pa", "ri", "so", "tu")
_TARGETS = ("Paris", "Rome", "Old Town", "Oslo", "Lima", "New Port", "Cairo")


def _name(index: int) -> str:
    first, rest = index % 12, index // 12
    return (_SYLLABLES[first] + _SYLLABLES[(rest + 5 * first) % 12] + _SYLLABLES[rest // 12 % 12]).title()


def records(n: int, answers: Sequence[str] = _TARGETS) -> list[Record]:
    """Made-up facts, each about a subject of its own; always the same ones."""
    made, many = [], len(answers)
    one, two = ("oxygen", "four") if answers is _TARGETS else answers[:2]
    for i in range(n):
        name, target, old = _name(i), answers[i % many], answers[(i + many // 2) % many]
        near = [Probe(f"The capital of {_name(1700 + i + k)} is", answers[(i + k) % many]) for k in (1, 2)]
        made.append(
            Record(
                prompt=f"The capital of {name} is",
                target=target,
                subject=name,
                relation="capital",
                id=f"made-{i}",
                paraphrases=(f"{name}'s capital is", f"The main city of {name} is called"),
                neighbours=tuple(near),
                unrelated=(Probe("Water is made of hydrogen and", one), Probe("Two and two are", two)),
                answer=old,
            )
        )
    return made


def records_for(lm: LM, n: int) -> list[Record]:
    """Made-up facts whose answers this model can give: a classifier's are its classes."""
    return records(n, lm.labels) if lm.kind == "classifier" else records(n)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fails unless the model leaves the block as it came in: bits, flags, gradients, hooks and modules."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        different = [key for key in before | after if before.get(key) != after.get(key)]
        assert not different, f"the model was changed: {different}"


def _state(model: nn.Module) -> dict[str, object]:
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        flags = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | str | float)
        }
        state[f"module {name}"] = (id(module), flags, [len(kind) for kind in hooks])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy().tobytes()
        state[f"tensor {name}"] = (
            tensor.dtype,
            tensor.shape,
            tensor.requires_grad,
            tensor.grad is None,
            bits,
        )
    return state


# ------------------------------------------------------------------------------------------- editors


@dataclass(frozen=True, slots=True)
class EditorCase:
    """An editor as the suite of all editors runs it (tests/editors/test_every_editor.py)."""

    config: dict[str, Any] = field(default_factory=dict)  # settings that are fast, and large enough to show
    refuses: dict[Kind, str] = field(default_factory=dict)  # kind of model -> what its error says
    own_sites: bool = False  # edits the matrices of its default, not those of the suite
    teaches: bool = True  # an edit makes its target likelier, also in a random model


EDITOR_CASES: dict[str, EditorCase] = {
    "mend": EditorCase({"rank": 8, "alpha": 0.02}),
    "enn": EditorCase({"inner_lr": 0.05}),
    "ke": EditorCase({"lstm_hidden": 8, "condition": 12, "hidden": 8}),
    "malmen": EditorCase({"rank": 8, "eta": 1e-3}),
    "meta-curvature": EditorCase({"alpha": 0.02}),
    "meta-sgd": EditorCase({"alpha": 0.02}),
    "meta-lstm": EditorCase({"hidden": 3, "alpha": 0.05}),
    "ft": EditorCase({"lr": 0.01, "steps": 3}),
    "ft-kl": EditorCase({"lr": 0.01, "steps": 3, "c_edit": 1.0}),
    "ft-constrained": EditorCase({"lr": 0.01, "steps": 3}),
    "ft-penalised": EditorCase({"lr": 0.01, "steps": 3, "coefficient": 0.1}),
    "diff-pruning": EditorCase({"lr": 0.01, "steps": 3, "gate_lr": 0.1}),
    "ewc": EditorCase({"lr": 0.01, "steps": 3, "texts": 3}),
    "lora": EditorCase({"lr": 0.01, "steps": 3}),
    "locft": EditorCase({"lr": 0.01, "epochs": 3}),
    "crisp": EditorCase(
        {"lr": 0.01, "epochs": 3, "gamma": 0.5},
        refuses={"seq2seq": "crisp is for decoders", "classifier": "crisp is for decoders"},
    ),
    "rome": EditorCase(
        {"lr": 0.3, "steps": 3},
        refuses={"seq2seq": "rome is for decoders", "classifier": "rome is for decoders"},
    ),
    "joint-rome": EditorCase(
        {"lr": 0.3, "epochs": 3, "running": 1, "passages": 4},
        refuses={"seq2seq": "joint-rome is for decoders", "classifier": "joint-rome is for decoders"},
    ),
    "memit": EditorCase(
        {"lr": 0.3, "steps": 3, "covariance": 1.0},
        refuses={"seq2seq": "memit is for decoders", "classifier": "memit is for decoders"},
        own_sites=True,
    ),
    "alphaedit": EditorCase(
        {"lr": 0.3, "steps": 3, "threshold": 3.0},
        refuses={"seq2seq": "alphaedit is for decoders", "classifier": "alphaedit is for decoders"},
        own_sites=True,
    ),
    "ultraedit": EditorCase(
        {"eta": 1e-3},
        refuses={"seq2seq": "ultraedit is for decoders", "classifier": "ultraedit is for decoders"},
    ),
    "repair": EditorCase({"margin": 0.1}, own_sites=True),
    "k-adapter": EditorCase({"width": 4, "lr": 0.05, "steps": 3}),
    "cache": EditorCase(),
    "in-context": EditorCase(refuses={"classifier": "classifier, which answers with classes"}, teaches=False),
}
"""One row for each method of :data:`emendo.editors.EDITORS`."""
