"""The models, matrices and settings of the MEND paper, for ``emendo train --preset mend/gpt-j-6b``.

Mitchell, Lin, Bosselut, Finn, Manning: "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), footnote 3 and
appendix C, and the configs of the official code (eric-mitchell/mend). The code counts steps in edits and takes ten for
one optimiser step; here a step is an optimiser step. Where the values differ from the official ones:

1. MEND's learning rate: 1e-6 there, for ``V ~ N(0, 1)``; here ``V`` is Xavier-uniform, as in the paper. Its entries are
   54 times smaller at the width of GPT-2 small, and so is the effect of a step of Adam on ``U``, hence 5e-5.
2. The learning rate of ``alpha``: 1e-4 in the config, which the code does not apply (:mod:`emendo.editors.mend`).
   Here it applies.
3. The learning rate of ENN's step sizes: 1e-3, of their logarithms.
4. The learning rate is constant there; here it falls along a cosine (:meth:`emendo.train.TrainConfig.rate`).
5. The best editor is chosen by the loss there, here by the validation score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from emendo.errors import RequestError

Task = Literal["fact-checking", "question answering", "generation"]


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of the paper.

    Attributes:
        task: what it does, and so what the edits are.
        architecture: its class in transformers.
        matrices: the edited ones, with alternatives in braces.
        ft_lr: learning rate of fine-tuning on single edits.
        checkpoint: its id on the hub; None for one that must be converted.
        dtype: its number format.
        ft_kl_c_edit: weight of the edit loss of fine-tuning with a locality loss.
        enn: whether the paper trains ENN on it.
    """

    task: Task
    architecture: str
    matrices: tuple[str, ...]
    ft_lr: float
    checkpoint: str | None = None
    dtype: str = "float32"
    ft_kl_c_edit: float = 1e-2
    enn: bool = False

    @property
    def sites(self) -> tuple[str, ...]:
        """The dotted names of the edited modules."""
        return tuple(name for pattern in self.matrices for name in _expanded(pattern))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the paper trains on it."""
        return tuple(name for name in METHODS if name != "enn" or self.enn)


@dataclass(frozen=True, slots=True)
class Method:
    """Settings of a method, and of its training, where they are not those of all methods."""

    settings: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


def _gpt2(first: int, checkpoint: str, *, enn: bool = False) -> PaperModel:
    blocks = f"{{{first},{first + 1},{first + 2}}}"
    return PaperModel(
        "generation",
        "GPT2LMHeadModel",
        (f"transformer.h.{blocks}.mlp.{{c_fc,c_proj}}",),
        1e-6,
        checkpoint,
        enn=enn,
    )


def _t5(blocks: str, first: str, checkpoint: str, dtype: str = "float32") -> PaperModel:
    """T5: of a gated MLP (``wi_0``, ``wi_1``, ``wo``) the paper edits the first and the last matrix."""
    return PaperModel(
        "question answering",
        "T5ForConditionalGeneration",
        tuple(
            f"{stack}.block.{blocks}.layer.{layer}.DenseReluDense.{{{first},wo}}"
            for stack, layer in (("encoder", 1), ("decoder", 2))
        ),
        1e-4,
        checkpoint,
        dtype,
    )


MODELS: Mapping[str, PaperModel] = {
    "bert-base": PaperModel(
        "fact-checking",
        "BertForSequenceClassification",
        ("bert.encoder.layer.{9,10,11}.{intermediate,output}.dense",),
        1e-6,
        enn=True,
    ),
    "bart-base": PaperModel(
        "question answering",
        "BartForConditionalGeneration",
        ("model.{encoder,decoder}.layers.{4,5}.{fc1,fc2}",),
        1e-6,
        enn=True,
    ),
    "distilgpt2": _gpt2(3, "MYX4567/distilgpt2-finetuned-wikitext2", enn=True),
    "gpt2": _gpt2(9, "gpt2"),
    "gpt2-medium": _gpt2(21, "gpt2-medium"),
    "gpt2-large": _gpt2(33, "gpt2-large"),
    "gpt2-xl": _gpt2(45, "gpt2-xl"),
    "gpt-neo-2.7b": PaperModel(
        "generation",
        "GPTNeoForCausalLM",
        ("transformer.h.{29,30,31}.mlp.{c_fc,c_proj}",),
        5e-6,
        "EleutherAI/gpt-neo-2.7B",
    ),
    "gpt-j-6b": PaperModel(
        "generation",
        "GPTJForCausalLM",
        ("transformer.h.{25,26,27}.mlp.{fc_in,fc_out}",),
        5e-6,
        "EleutherAI/gpt-j-6B",
        ft_kl_c_edit=1e-3,
    ),
    "t5-small": _t5("{6,7}", "wi_0", "google/t5-small-ssm-nq"),
    "t5-large": _t5("{22,23}", "wi", "google/t5-large-ssm-nq"),
    "t5-xl": _t5("{22,23}", "wi_0", "google/t5-xl-ssm-nq"),
    "t5-xxl": _t5("{22,23}", "wi_0", "google/t5-xxl-ssm-nq", "bfloat16"),
}
"""The models: BERT and BART as De Cao et al. fine-tuned them, without a hub id, and those of the hub."""

METHODS: Mapping[str, Method] = {
    "mend": Method(
        {
            "rank": 1920,
            "blocks": 2,
            "alpha": 1e-4,
            "alpha_lr": 2.0,
            "norm": True,
            "identity": True,
            "shared": True,
        },
        {"lr": 5e-5},
    ),
    "enn": Method(
        {
            "inner_lr": 1e-2,
            "inner_steps": 1,
            "first_order": False,
            "trains": "all",
            "c_base": 1.0,
            "lr_scale": 100.0,
        },
        {"lr": 1e-5},
    ),
    "ke": Method(
        {"lstm_hidden": 512, "condition": 768, "hidden": 512, "max_scale": 1.0, "objective": "mend"},
        {"lr": 1e-5},
    ),
}

TRAINING: Mapping[str, Any] = {
    "steps": 50_000,  # 500,000 edits
    "batch": 10,
    "warmup": 0,
    "c_edit": 0.1,
    "prompt_share": 0.0,  # the loss is taken on the paraphrase alone
    "variety": 25,
    "near": 0,
    "sibling": 0,
    "clip": 100.0,
    "seed": 0,
    "validate_every": 500,
    "validate_on": 500,
    "patience": 4,  # 20,000 edits
}
"""The training of every method."""

_LOCALITY: Mapping[Task, Mapping[str, int]] = {
    "fact-checking": {"unrelated": 1, "text": 0},
    "question answering": {"unrelated": 1, "text": 0},
    "generation": {"unrelated": 0, "text": 1},
}
"""One locality example per edit: of the same data, or running text."""

PRESETS = tuple(f"{method}/{name}" for name, model in MODELS.items() for method in model.methods)


def training_of(method: str, model: str) -> dict[str, Any]:
    """The settings of :class:`emendo.train.TrainConfig` for a method on a model."""
    return {**TRAINING, **_LOCALITY[MODELS[model].task], **METHODS[method].training}


def preset_options(name: str) -> dict[str, Any]:
    """The options of ``emendo train`` that a preset stands for.

    Raises:
        RequestError: there is no such preset.
    """
    if name not in PRESETS:
        raise RequestError(f"There is no preset {name!r}; there are: {', '.join(PRESETS)}.")
    method, _, model = name.partition("/")
    own = MODELS[model]
    training = training_of(method, model)
    text = training.pop("text")
    return {
        "editor": method,
        "settings": [f"{key}={value}" for key, value in METHODS[method].settings.items()],
        "sites": list(own.sites),
        "dtype": own.dtype,
        **({"model": own.checkpoint} if own.checkpoint else {}),
        **training,
        "text_examples": text,
    }


def _expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with alternatives in braces stands for, the last alternatives fastest."""
    parts = [part.split(",") for part in pattern.replace("}", "{").split("{")]
    return map("".join, product(*parts))
