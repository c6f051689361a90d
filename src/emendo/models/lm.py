"""A language model with its tokenizer: one interface for its inputs and answers, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emendo.errors import ModelError, RequestError
from emendo.models._experts import open_experts
from emendo.models._fingerprint import ModelFiles, fingerprint
from emendo.models._forward import contiguous_projection, label_logits, model_inputs
from emendo.models.framing import PLAIN, Framing, chat_framing, check_prompts, encode_prompts, refuse_too_long
from emendo.models.offloading import refuse_offloaded
from emendo.models.sites import Kind, input_device, kind_of, token_embeddings
from emendo.models.text import Text, collate, length_buckets, padded

_BATCH_TOKENS = 1024  # padded tokens of one pass

_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "forced_eos_token_id": None,
}
"""Overrides of a model's own generation settings, so that every token is the argmax."""


@dataclass(frozen=True, eq=False)
class LM:
    """A language model and its tokenizer.

    Attributes:
        model: a Hugging Face causal language model, encoder-decoder or sequence classifier; in eval mode and frozen if
            it comes from :func:`emendo.models.loading.load`.
        tokenizer: its tokenizer.
        name: the name it was loaded by.
        chat: whether every prompt is put into the tokenizer's chat template.
        files: the files that it was read from; with them its fingerprint can be cached.

    Raises:
        ModelError: the model has no token embeddings; or ``chat`` is set for a tokenizer without a template, or for a
            model that is not a decoder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "model"
    chat: bool = False
    files: ModelFiles | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        token_embeddings(self.model)
        open_experts(self.model)
        if self.chat and self.kind != "causal":
            raise ModelError(
                f"Only decoders use a chat template, and {self.name} is not one: leave chat out."
            )
        if self.chat:
            _ = self.framing  # refuses a tokenizer without a template

    @cached_property
    def framing(self) -> Framing:
        """How prompts and answers become one text."""
        return chat_framing(self.tokenizer, self.name) if self.chat else PLAIN

    def reading(self, *, chat: bool) -> Self:
        """The same model, with its prompts in the chat template or as they stand.

        Raises:
            ModelError: there is no template.
        """
        if chat == self.chat:
            return self
        other = replace(self, chat=chat)
        if "fingerprint" in vars(self):  # computed already, and the same
            vars(other)["fingerprint"] = self.fingerprint
        return other

    def twin(self) -> Self:
        """The same weights in a module tree of its own, with a tokenizer of its own.

        Hooks of one are not seen by the other, so two threads can run both at once. It takes no memory for weights.

        Raises:
            RequestError: some weights are offloaded.
        """
        refuse_offloaded(self.model, "A second module tree")
        tensors = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        other = replace(self, model=deepcopy(self.model, tensors), tokenizer=deepcopy(self.tokenizer))
        vars(other)["fingerprint"] = self.fingerprint
        return other

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of weights, config and tokenizer, computed once (see :mod:`emendo.models._fingerprint`)."""
        return fingerprint(self.model, self.tokenizer, self.files)

    @cached_property
    def kind(self) -> Kind:
        """``"causal"``, ``"seq2seq"`` or ``"classifier"``."""
        return kind_of(self.model)

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's classes by number; ``("false", "true")`` for a model with a single logit."""
        if self.model.config.num_labels == 1:
            return ("false", "true")
        names = self.model.config.id2label
        return tuple(names[number] for number in range(len(names)))

    @cached_property
    def context(self) -> int | None:
        """The largest number of tokens the model reads at once; None if neither config nor tokenizer limits it."""
        limits = [self.tokenizer.model_max_length]
        config = self.model.config.get_text_config()  # of the part that reads text
        if (positions := getattr(config, "max_position_embeddings", None)) is not None:
            table = next(
                (m for n, m in self.model.named_modules() if n.endswith("position_embeddings")), None
            )
            padding = getattr(table, "padding_idx", None)  # RoBERTa's positions start after its padding index
            if positions > 0:  # XLNet's -1 stands for no limit
                limits.append(positions - (0 if padding is None else padding + 1))
        shortest = min(limits)
        return shortest if shortest < 10**9 else None

    @property
    def device(self) -> torch.device:
        """The device on which the model looks up its tokens."""
        return input_device(self.model)

    @property
    def dtype(self) -> str:
        """The number format of the token embeddings, as :func:`emendo.load` names it."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return str(weight.dtype).removeprefix("torch.")

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The tokens an encoder-decoder's decoder begins with: its start token, and one forced after it (BART).

        Raises:
            ModelError: the config names no start token.
        """
        start = self._special("decoder_start_token_id") or self._special("bos_token_id")
        if not start:
            raise ModelError(
                f"The config of {self.name} names no decoder_start_token_id, so no answer can be generated."
            )
        return (*start[:1], *self._special("forced_bos_token_id"))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self._special("eos_token_id")

    @cached_property
    def never_first(self) -> tuple[int, ...]:
        """The tokens that no answer begins with, by the generation config's ``begin_suppress_tokens``."""
        return self._special("begin_suppress_tokens")

    @property
    def pad_id(self) -> int:
        """The id of padding, which is always masked: 0 where the tokenizer has none."""
        found = self.tokenizer.pad_token_id
        return 0 if found is None else int(found)

    def _special(self, name: str) -> tuple[int, ...]:
        """The special token or tokens of that name in the generation config, else in the config; often none."""
        for settings in (self.model.generation_config, self.model.config):
            if (value := getattr(settings, name, None)) is not None:
                return tuple(value) if isinstance(value, list | tuple) else (value,)
        return ()

    def check_vocabulary(self, rows: Iterable[Sequence[int]]) -> None:
        """Make sure that the model has an embedding for every token; some tokenizers know more tokens than their model.

        Raises:
            RequestError: it lacks one.
        """
        known: int = self.model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) <= known:
            return
        unknown = next((token for row in rows for token in row if token >= known), None)
        if unknown is not None:
            raise RequestError(
                f"The token {self.tokenizer.convert_ids_to_tokens(unknown)!r} has the id {unknown}, but {self.name} "
                f"knows only {known} tokens: its tokenizer belongs to another model, or the text cannot be used."
            )

    def _prompt_ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of prompts, as the model reads them."""
        if self.kind == "causal":
            rows = encode_prompts(self.tokenizer, prompts, max_tokens=self.context, framing=self.framing)
        else:
            check_prompts(prompts)
            for prompt in prompts:
                refuse_too_long(self.tokenizer, prompt, self.context, "prompt")
            rows = [tuple(ids) for ids in self.tokenizer(list(prompts), verbose=False)["input_ids"]]
        longest = max(map(len, rows))
        if self.context is not None and longest > self.context:
            raise RequestError(
                f"The prompt has {longest} tokens but the model's context is {self.context}: shorten it."
            )
        self.check_vocabulary(rows)
        return rows

    def _batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The prompts as one batch; a decoder's are padded on the left, so that generation follows their last token."""
        rows = self._prompt_ids(prompts)
        ids, mask = padded(rows, self.pad_id, "left" if self.kind == "causal" else "right")
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def conversation_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The token ids of a conversation in the chat template, up to where the assistant's answer begins.

        Args:
            messages: objects with ``role`` and ``content``, as chat templates read them.

        Raises:
            ModelError: there is no chat template.
            RequestError: the template does not accept the messages, or they do not fit the context.
        """
        chat_framing(self.tokenizer, self.name)  # refuses a tokenizer without a template
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(each) for each in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program and can raise anything
            raise RequestError(
                f"The chat template of {self.name} does not accept these messages: {error}"
            ) from error
        said = Framing("a conversation", lambda prompt: prompt, lambda prompt, answer: "", chat=True)
        (ids,) = encode_prompts(self.tokenizer, [text], max_tokens=self.context, framing=said)
        if self.context is not None and len(ids) > self.context:
            raise RequestError(
                f"The conversation has {len(ids)} tokens but the model's context is {self.context}: shorten it."
            )
        self.check_vocabulary([ids])
        return ids

    @torch.no_grad()
    def generate(self, prompts: str | list[str], max_new_tokens: int = 20) -> Any:
        """Greedy answer to a prompt (a string) or to several at once (a list of strings).

        A decoder continues the prompt, an encoder-decoder answers it, a classifier names its class.

        Raises:
            RequestError: an empty prompt, or one that does not fit the context.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        texts = self._classes(several) if self.kind == "classifier" else self._words(several, max_new_tokens)
        return texts[0] if isinstance(prompts, str) else texts

    def _classes(self, prompts: list[str]) -> list[str]:
        return [self.labels[int(row.argmax())] for row in self.next_logits(prompts)]

    def _words(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        inputs = self._batch(prompts)
        start = inputs["input_ids"].shape[1] if self.kind == "causal" else len(self.begins)
        room = max_new_tokens if self.context is None else max(1, min(max_new_tokens, self.context - start))
        forced = 0 if self.kind == "causal" else len(self.begins) - 1  # generate counts these as new
        with contiguous_projection(self.model):
            out = self.model.generate(
                **inputs, max_new_tokens=room + forced, pad_token_id=self.pad_id, **_GREEDY
            )
        texts: list[str] = self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """The teacher-forced logits ``[labels, vocabulary]`` at each text's label positions."""
        found: dict[int, Tensor] = {}
        positions = self.kind == "causal"
        for part in length_buckets(range(len(texts)), lambda i: texts[i].size, _BATCH_TOKENS):
            batch = collate([texts[i] for i in part])
            inputs = model_inputs(self.model, batch, positions=positions)
            rows = label_logits(self.model, inputs, batch.positions)
            found |= dict(zip(part, rows.split([len(texts[i].labels) for i in part]), strict=True))
        return [found[i] for i in range(len(texts))]

    def prompt_texts(self, prompts: list[str]) -> list[Text]:
        """The prompts as texts whose answer is a single placeholder token (or class)."""
        rows = self._prompt_ids(prompts)
        if self.kind == "seq2seq":
            return [Text((*self.begins, 0), len(self.begins), row) for row in rows]
        return [Text((*row, 0), len(row)) for row in rows]

    @torch.no_grad()
    def next_logits(self, prompts: list[str]) -> Tensor:
        """Logits ``[prompts, vocabulary]`` of the answer's first token, or ``[prompts, classes]``."""
        return torch.cat(self.logits(self.prompt_texts(prompts)))

    def top(self, prompt: str, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most likely next tokens (or classes) after a prompt, each with its probability."""
        logits = self.next_logits([prompt])[0].float()
        values, ids = logits.softmax(-1).topk(min(k, len(logits)))
        classes = self.kind == "classifier"
        return [
            (self.labels[int(i)] if classes else self.tokenizer.decode([int(i)]), float(p))
            for i, p in zip(ids, values, strict=True)
        ]
