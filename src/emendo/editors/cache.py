"""The cache: no weight is changed; where a prompt is close to that of a stored fact, the stored target is the answer.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022 (arXiv 2110.11309), appendix G and Table 11. With ``h_t`` the
hidden states of a prompt ``x``::

    z(x)      = mean_t h_t
    answer(x) = y_e    if ||z(x) - z(x_e)||_2 < radius for the nearest stored fact e
                the model's own otherwise

``h`` is the last hidden state: of a decoder over the prompt, of an encoder-decoder's encoder, of a classifier over its
text. The mean excludes the answer's tokens, so the distance of a prompt does not depend on its answer.

In generation from passages the paper looks up anew before every token, with the mean over all tokens so far:
``lookup="token"``, for decoders. As in its code (algs/lu.py of eric-mitchell/serac) the target's tokens are then stored
one by one, each with the mean of the tokens before it.

What the paper leaves open, and what is done here:

1. Logits: the paper gives the looked-up token the logit 1 and all others 0, hence nearly the same probability. Here
   that logit is a setting, 20 by default: p > 0.9999 among 50,000 tokens, and any other token costs 20 nats. The argmax
   does not depend on it.
2. Targets of several tokens: teacher forced, position ``i`` of the answer gives the target's token ``i``, whatever the
   tokens before it; positions after the target's end are the model's own. Generation gives the target and stops.
3. The radius is a distance in one model's hidden states and means nothing in another's. The paper took the one whose
   drawdown was MEND's: 6.5 (BERT, FEVER), 3 (BART, zsRE), 2.5 (distilGPT-2, Wikitext).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emendo._settings import Settings, setting
from emendo.editors.base import Editor, as_requests
from emendo.edits.edit import BaseEdit, Origin, Request
from emendo.errors import RequestError
from emendo.models._forward import model_inputs
from emendo.models.lm import LM
from emendo.models.sites import find_stacks
from emendo.models.text import Text, collate, greedy, length_buckets

_BATCH_TOKENS = 1024  # padded tokens of one pass


@dataclass(frozen=True, slots=True)
class CacheConfig(Settings):
    """The cache's settings."""

    radius: float = setting(3.0, "Euclidean distance below which a stored fact answers a prompt.", least=0)
    layer: int = setting(
        -1, "Hidden state: 0 is the input of the first block, -1 the last one, after the final norm."
    )
    lookup: Literal["prompt", "token"] = setting(
        "prompt", "Look up once by the prompt, or before every token by all tokens so far (decoders only)."
    )
    logit: float = setting(
        20.0, "Logit of the token that was looked up; all others have 0 (1 in the paper).", above=0
    )


@dataclass(frozen=True, eq=False)
class CacheEdit(BaseEdit):
    """Stored facts.

    Attributes:
        keys: ``[entries, width]`` mean hidden states, float32.
        targets: the tokens that each entry answers with.
    """

    kind: ClassVar[str] = "cache"
    keys: Tensor
    targets: tuple[tuple[int, ...], ...]
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> CacheConfig:
        """The settings it was made with."""
        return CacheConfig(**self.origin.settings)

    @contextmanager
    def applied(self, model: LM) -> Iterator[LM]:
        """The model with its answers looked up first; see :meth:`emendo.edits.edit.BaseEdit.applied`."""
        self.check(model)
        yield _LookingUp(model.model, model.tokenizer, model.name, model.chat, inner=model, edit=self)

    def found(self, queries: Tensor) -> list[tuple[int, ...]]:
        """The target stored nearest to each of ``queries [n, width]``; empty where none is within the radius."""
        exact = "donot_use_mm_for_euclid_dist"
        distance, nearest = torch.cdist(queries, self.keys.to(queries), compute_mode=exact).min(-1)
        close = (distance < self.config.radius).tolist()
        return [
            self.targets[entry] if near else () for entry, near in zip(nearest.tolist(), close, strict=True)
        ]

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"keys": self.keys}, {"targets": [list(target) for target in self.targets]}

    @classmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        targets = tuple(tuple(map(int, target)) for target in values["targets"])
        if len(targets) != len(tensors["keys"]):
            raise ValueError("the number of keys")
        CacheConfig(**origin.settings)  # refuses wrong settings
        return cls(tensors["keys"], targets, origin, card)


@dataclass(frozen=True, eq=False)
class _LookingUp(LM):
    """A model whose answers are looked up first.

    Attributes:
        inner: the model that answers where nothing is found.
        edit: the stored facts.
    """

    inner: LM = field(kw_only=True)
    edit: CacheEdit = field(kw_only=True)

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """As :meth:`LM.logits`; one-hot where a token was looked up."""
        found = []
        for rows, text, answer in zip(self.inner.logits(texts), texts, self._answers(texts), strict=True):
            places = [i for i, token in enumerate(answer) if token is not None and i < len(text.labels)]
            tokens = torch.tensor([answer[i] for i in places], dtype=torch.long, device=rows.device)
            sure = self.edit.config.logit * F.one_hot(tokens, rows.shape[-1]).to(rows)
            found.append(rows.index_copy(0, torch.tensor(places, dtype=torch.long, device=rows.device), sure))
        return found

    def _answers(self, texts: Sequence[Text]) -> list[Sequence[int | None]]:
        """For each text the looked-up token at each label position, None where nothing was found."""
        config = self.edit.config
        means = _means(self, texts, config)
        stored = iter(self.edit.found(torch.cat(means)))
        if config.lookup == "prompt":
            return [next(stored) for _ in texts]
        return [[next(iter(next(stored)), None) for _ in rows] for rows in means]

    def _ended(self, place: int, new: list[int]) -> bool:
        return new[-1] in self.ends

    def _words(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        texts = self.prompt_texts(prompts)
        if self.edit.config.lookup == "token":
            begun = [Text(text.ids[:-1], text.start) for text in texts]
            new = greedy(self.logits, begun, max_new_tokens, done=self._ended, limit=self.context)
            return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))
        answers = self.edit.found(torch.cat(_means(self, texts, self.edit.config)))
        said = [self.tokenizer.decode(a[:max_new_tokens], skip_special_tokens=True) for a in answers]
        own = [i for i, answer in enumerate(answers) if not answer]
        if own:
            words = self.inner.generate([prompts[i] for i in own], max_new_tokens)
            for i, text in zip(own, words, strict=True):
                said[i] = text
        return said


class Cache(Editor):
    """The cache; see the module's docstring."""

    name = "cache"
    Config = CacheConfig
    config: CacheConfig
    needs_training = False
    makes = CacheEdit
    no_changes = "cache changes no weights"

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> CacheEdit:
        """Store one fact or several; see :meth:`emendo.editors.base.Editor.edit`."""
        requests = as_requests(prompt, target)
        texts = self.texts(lm, requests)
        means, targets = _means(lm, texts, self.config), [text.labels for text in texts]
        if self.config.lookup == "token":
            targets = [(token,) for labels in targets for token in labels]
        return CacheEdit(torch.cat(means).cpu(), tuple(targets), self.origin(lm, requests))


@torch.no_grad()
def _means(lm: LM, texts: Sequence[Text], config: CacheConfig) -> list[Tensor]:
    """The key of each text: ``[1, width]`` for its prompt, or ``[labels, width]`` before every token.

    Raises:
        RequestError: the model has no such layer, or is no decoder where ``lookup`` is ``"token"``.
    """
    if config.lookup == "token" and lm.kind != "causal":
        raise RequestError(f"lookup=token is for decoders, and {lm.name} is none; use lookup=prompt.")
    whole = config.lookup == "token" or lm.kind != "causal"
    read = texts if whole else [Text((*text.ids[: text.start], 0), text.start) for text in texts]
    found: dict[int, Tensor] = {}
    for part in length_buckets(range(len(read)), lambda i: len(read[i].trunk), _BATCH_TOKENS):
        batch = collate([read[i] for i in part])
        hidden, mask = _hidden(lm, model_inputs(lm.model, batch), config.layer), batch.trunk_mask
        for i, states, used in zip(part, hidden, mask.bool().to(hidden.device), strict=True):
            rows = states[used].float()
            if config.lookup == "prompt":
                found[i] = rows.mean(0, keepdim=True)
            else:
                counts = torch.arange(1, len(rows) + 1, device=rows.device)
                found[i] = (rows.cumsum(0) / counts[:, None])[texts[i].start - 1 :]
    return [found[i] for i in range(len(texts))]


def _hidden(lm: LM, inputs: dict[str, Any], layer: int) -> Tensor:
    """A hidden state ``[texts, tokens, width]``, of the encoder where there is one.

    A hook captures it: ``output_hidden_states`` makes a model of transformers keep hooks of its own for ever.
    """
    stack = find_stacks(lm.model)[0]
    if not -stack.depth - 1 <= layer <= stack.depth:
        raise RequestError(f"layer={layer}: {lm.name} has the hidden states 0 to {stack.depth}.")
    model: Any = lm.model.base_model
    if lm.kind == "seq2seq":
        model = lm.model.get_encoder()
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states: dict[int, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[block] = args[0] if args else kwargs["hidden_states"]

    block = layer % (stack.depth + 1)
    if block == stack.depth:
        last: Tensor = model(**inputs).last_hidden_state
        return last
    module = lm.model.get_submodule(f"{stack.name}.{block}")
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return states[block]
