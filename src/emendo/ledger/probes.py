"""Probes: measuring the model on prompts and a plain text that an edit must not affect."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from emendo.data.atlas import load as load_atlas
from emendo.errors import DataError
from emendo.ledger.health import Drift
from emendo.models.lm import LM
from emendo.models.losses import token_kl, token_nll
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

_BUILT_IN = 32
"""Number of built-in probes."""

PASSAGE = (
    "Bread is made from flour, water, salt and a little yeast. The baker mixes them early in the morning and "
    "leaves the dough to rest in a warm place until it has grown to twice its size. Then he folds it, shapes "
    "it into loaves and sets them in a row on a wooden board. While the oven heats up, he sweeps the floor "
    "and opens the shutters of the shop. The first customers are usually on their way to work: a nurse who "
    "buys two rolls, a bus driver who asks for coffee, and an old man with a dog who has come every day for "
    "as long as anyone can remember. In winter they stay a while and talk about the weather, because it is "
    "warm inside and the windows are white with steam. By noon most of the bread is gone. What is left is "
    "sold for half the price in the evening, or given away. On Sundays the shop is closed, and the whole "
    "street is quiet."
)
"""The built-in plain text; it states no fact that anyone would edit."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Prompts and a text on which an edit must not change the model.

    Attributes:
        prompts: prompts with their answers; the model is compared at the answer's tokens. With an empty answer it is
            compared at the next token.
        passage: a plain text whose perplexity is compared; empty for none. Only a decoder has a perplexity.
    """

    prompts: tuple[tuple[str, str], ...] = field(default_factory=lambda: built_in_prompts())
    passage: str = PASSAGE


def built_in_prompts() -> tuple[tuple[str, str], ...]:
    """Facts of many relations, from the validation split of the built-in data."""
    return tuple((record.prompt, record.answer or "") for record in load_atlas("validation", _BUILT_IN))


def read_prompts(file: str | Path) -> tuple[tuple[str, str], ...]:
    """A user's own prompts, one a line: plain text, or ``{"prompt": ..., "answer": ...}``.

    Raises:
        DataError: the file cannot be read or is empty, or a line is neither of the two.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    found = [_prompt(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{file} has no prompt in it; give one a line.")
    return tuple(found)


def _prompt(line: str, where: str) -> tuple[str, str]:
    if not line.lstrip().startswith("{"):
        return line, ""
    try:
        value = json.loads(line)
        prompt, answer = value["prompt"], value.get("answer") or ""
        if isinstance(prompt, str) and isinstance(answer, str) and prompt.strip():
            return prompt, answer
    except (ValueError, KeyError, RecursionError):
        pass
    raise DataError(
        f'{where}: expected a prompt, or {{"prompt": "...", "answer": "..."}}, found {line[:60]!r}'
    )


@dataclass(frozen=True, eq=False)
class ProbeOutputs:
    """The outputs of one state of a model on the probes.

    Attributes:
        prompts: the prompts.
        logits: ``[labels, vocabulary]`` for each prompt.
        nll: negative log-likelihood of the passage, in nats per token; None without a passage.
    """

    prompts: tuple[str, ...]
    logits: tuple[Tensor, ...]
    nll: float | None

    def drift(self, before: ProbeOutputs, excluded: Collection[str] = ()) -> Drift:
        """The difference from earlier outputs of the same model.

        Args:
            before: the earlier outputs.
            excluded: prompts that do not count, because an edit changes them on purpose.
        """
        pairs = [
            (old, new)
            for prompt, old, new in zip(self.prompts, before.logits, self.logits, strict=True)
            if prompt not in excluded
        ]
        changed = [bool((old.argmax(-1) != new.argmax(-1)).any()) for old, new in pairs]
        kl = [float(token_kl(old, new).mean()) for old, new in pairs]
        ratio = None
        if self.nll is not None and before.nll is not None:
            ratio = float(torch.tensor(self.nll - before.nll, dtype=torch.float64).exp())
        count = max(1, len(pairs))
        return Drift(sum(changed) / count, sum(kl) / count, ratio)


class ProbeRunner:
    """The probes, tokenised once for a model; :meth:`run` takes the outputs of the model as it is at the moment."""

    def __init__(self, lm: LM, probes: Probes) -> None:
        self.lm = lm
        self.prompts = tuple(prompt for prompt, _ in probes.prompts)
        self._texts = _tokenised(lm, probes.prompts)
        self._passage = _passage(lm, probes.passage)

    @property
    def texts(self) -> tuple[Text, ...]:
        """The prompts, and the passage if there is one."""
        return (*self._texts, *([] if self._passage is None else [self._passage]))

    @torch.no_grad()
    def run(self, lm: LM | None = None) -> ProbeOutputs:
        """The outputs of the model with everything that is attached to it; ``lm`` may have a memory besides."""
        lm = lm or self.lm
        return ProbeOutputs(self.prompts, tuple(lm.logits(self._texts)), self._nll(lm))

    @torch.no_grad()
    def rerun(self, lm: LM, before: ProbeOutputs, places: Collection[int]) -> ProbeOutputs:
        """The outputs where only some differ from earlier ones.

        Args:
            lm: the model.
            before: the earlier outputs.
            places: of the texts that are run again, in :attr:`texts`.
        """
        own = [place for place in sorted(places) if place < len(self._texts)]
        found = list(before.logits)
        for place, logits in zip(own, lm.logits([self._texts[i] for i in own]), strict=True):
            found[place] = logits
        nll = self._nll(lm) if len(self._texts) in places else before.nll
        return ProbeOutputs(self.prompts, tuple(found), nll)

    def _nll(self, lm: LM) -> float | None:
        if self._passage is None:
            return None
        labels = torch.tensor(self._passage.labels, device=self.lm.device)
        return float(token_nll(lm.logits([self._passage])[0], labels).mean())


def _tokenised(lm: LM, prompts: Sequence[tuple[str, str]]) -> list[Text]:
    texts = []
    for prompt, answer in prompts:
        answered = answer and lm.kind != "classifier"  # a classifier's answer is a class
        texts += to_texts(lm, [(prompt, answer)]) if answered else lm.prompt_texts([prompt])
    return texts


def _passage(lm: LM, passage: str) -> Text | None:
    if lm.kind != "causal" or not passage.strip():
        return None
    ids = lm.tokenizer(passage)["input_ids"][: lm.context]
    return Text(tuple(ids), 1) if len(ids) > 1 else None
