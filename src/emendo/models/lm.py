"""A language model with its tokenizer: what it reads and what it answers, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emendo.errors import ModelError, RequestError
from emendo.models._fingerprint import fingerprint
from emendo.models._forward import label_logits, model_inputs
from emendo.models.chat import PLAIN, Framing, chat_framing
from emendo.models.sites import Kind, kind_of
from emendo.models.text import Text, collate, length_buckets

_BATCH_TOKENS = 1024  # padded tokens of one pass

_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "forced_eos_token_id": None,
}
"""What a model's own settings for generation may not change: every word is the argmax."""


@dataclass(frozen=True, eq=False)
class LM:
    """A language model and its tokenizer.

    Attributes:
        model: a Hugging Face causal language model, encoder-decoder or sequence classifier, in eval mode and frozen
            when it comes from :func:`emendo.models.loading.load`.
        tokenizer: its fast tokenizer.
        name: what it was loaded by.
        chat: whether every prompt that it reads is put into the tokenizer's chat template.

    Raises:
        ModelError: chat is asked of a tokenizer without a template, or of a model that is no decoder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "model"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and self.kind != "causal":
            raise ModelError(f"A chat template is for a decoder, which {self.name} is not: leave chat out.")
        if self.chat:
            _ = self.framing  # refuses a tokenizer without a template

    @cached_property
    def framing(self) -> Framing:
        """How it is given its prompts."""
        return chat_framing(self.tokenizer, self.name) if self.chat else PLAIN

    def reading(self, *, chat: bool) -> Self:
        """The same model, reading its prompts in the chat template or as they stand.

        Raises:
            ModelError: there is no template.
        """
        return self if chat == self.chat else replace(self, chat=chat)

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

    @cached_property
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

    @property
    def dtype(self) -> str:
        """The number format of its token embeddings, as :func:`emendo.load` names it."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return str(weight.dtype).removeprefix("torch.")

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """What an encoder-decoder's decoder begins with: its start token, and what generation forces after it (BART).

        Raises:
            ModelError: the model does not say.
        """
        start = self._special("decoder_start_token_id") or self._special("bos_token_id")
        if not start:
            raise ModelError(
                f"The config of {self.name} names no decoder_start_token_id, so nothing can be answered."
            )
        return (*start[:1], *self._special("forced_bos_token_id"))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens after which nothing follows."""
        return self._special("eos_token_id")

    def _special(self, name: str) -> tuple[int, ...]:
        """The token or tokens of that name in the settings for generation, else in the config; often none."""
        for settings in (self.model.generation_config, self.model.config):
            if (value := getattr(settings, name, None)) is not None:
                return tuple(value) if isinstance(value, list | tuple) else (value,)
        return ()

    def _tokens(self, prompts: list[str]) -> Any:
        if not all(prompt.strip() for prompt in prompts):
            raise RequestError("The prompt is empty; give the text to continue.")
        tokens = self.tokenizer(
            [self.framing.frame(prompt) for prompt in prompts],
            add_special_tokens=self.framing.special,
            return_tensors="pt",
            return_token_type_ids=False,
            padding=len(prompts) > 1,
            padding_side="left" if self.kind == "causal" else "right",
        ).to(self.device)
        length = tokens["input_ids"].shape[1]
        if self.context is not None and length > self.context:
            raise RequestError(
                f"The prompt has {length} tokens but the model's context is {self.context}: shorten it."
            )
        return tokens

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
        begun = inputs["input_ids"].shape[1] if self.kind == "causal" else len(self.begins)
        room = max_new_tokens if self.context is None else max(1, min(max_new_tokens, self.context - begun))
        forced = 0 if self.kind == "causal" else len(self.begins) - 1  # counted as new
        out = self.model.generate(
            **inputs,
            max_new_tokens=room + forced,
            pad_token_id=self.tokenizer.pad_token_id,
            **_GREEDY,
        )
        new = out[:, begun:]
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

    def prompt_texts(self, prompts: list[str]) -> list[Text]:
        """The prompts, each with one token (or class) to be predicted, which is any."""
        rows = self._tokens(prompts)
        ids = [
            tuple(row[mask.bool()].tolist())
            for row, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
        ]
        if self.kind == "seq2seq":
            return [Text((*self.begins, 0), len(self.begins), row) for row in ids]
        return [Text((*row, 0), len(row)) for row in ids]

    @torch.no_grad()
    def next_logits(self, prompts: list[str]) -> Tensor:
        """Logits ``[prompts, vocabulary]`` of the answer's first token, or ``[prompts, classes]``."""
        return torch.cat(self.logits(self.prompt_texts(prompts)))

    def top(self, prompt: str, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most likely next tokens (or classes) after a prompt, each with its probability."""
        logits = self.next_logits([prompt])[0].float()
        values, ids = logits.softmax(-1).topk(min(k, len(logits)))
        named = self.kind == "classifier"
        return [
            (self.labels[int(i)] if named else self.tokenizer.decode([int(i)]), float(p))
            for i, p in zip(ids, values, strict=True)
        ]
