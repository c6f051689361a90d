"""What must not change: prompts whose answers are watched, and a plain text whose perplexity is."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from emendo.data.atlas import load as load_atlas
from emendo.errors import DataError
from emendo.models.lm import LM
from emendo.models.losses import token_kl, token_nll
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

_BUILT_IN = 32
"""Prompts of the built-in facts that are watched."""

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
"""Plain English about nothing that anyone edits."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What an edit is not to change.

    Attributes:
        prompts: each with its answer, at whose tokens the model is watched; without one ("") the next token alone is.
        passage: a plain text; empty to watch none. Only a decoder's perplexity can be taken.
    """

    prompts: tuple[tuple[str, str], ...] = field(default_factory=lambda: built_in())
    passage: str = PASSAGE


def built_in() -> tuple[tuple[str, str], ...]:
    """Facts of many relations that the built-in data hold out from training."""
    return tuple((record.prompt, record.answer or "") for record in load_atlas("validation", _BUILT_IN))


def read_prompts(file: str | Path) -> tuple[tuple[str, str], ...]:
    """A user's own prompts, one a line: as they are, or as ``{"prompt": ..., "answer": ...}``.

    Raises:
        DataError: the file cannot be read, has nothing in it, or a line that is neither.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    found = [
        _prompt(line.strip(), f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise DataError(f"{file} has no prompt in it; give one a line.")
    return tuple(found)


def _prompt(line: str, where: str) -> tuple[str, str]:
    if not line.startswith("{"):
        return line, ""
    try:
        value = json.loads(line)
        prompt, answer = value["prompt"], value.get("answer") or ""
        if isinstance(prompt, str) and isinstance(answer, str) and prompt.strip():
            return prompt, answer
    except (json.JSONDecodeError, KeyError):
        pass
    raise DataError(
        f'{where}: expected a prompt, or {{"prompt": "...", "answer": "..."}}, found {line[:60]!r}'
    )


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a model is from what it was.

    Attributes:
        changed: share of watched prompts with another most likely token anywhere in the answer.
        kl: KL(before || after) in nats, mean over the answers' tokens, then over the prompts.
        perplexity: of the passage, after / before; None where there is none.
    """

    changed: float
    kl: float
    perplexity: float | None


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model says to everything that is watched.

    Attributes:
        prompts: what it was asked.
        logits: ``[labels, vocabulary]`` for each prompt.
        nll: of the passage, in nats per token; None where there is none.
    """

    prompts: tuple[str, ...]
    logits: tuple[Tensor, ...]
    nll: float | None

    def drift(self, before: Reading, besides: Collection[str] = ()) -> Drift:
        """How far this reading is from an earlier one of the same model.

        Args:
            before: the earlier one.
            besides: prompts that do not count, because an edit was asked to change them.
        """
        pairs = [
            (old, new)
            for prompt, old, new in zip(self.prompts, before.logits, self.logits, strict=True)
            if prompt not in besides
        ]
        changed = [bool((old.argmax(-1) != new.argmax(-1)).any()) for old, new in pairs]
        kl = [float(token_kl(old, new).mean()) for old, new in pairs]
        ratio = None
        if self.nll is not None and before.nll is not None:
            ratio = float(torch.tensor(self.nll - before.nll, dtype=torch.float64).exp())
        count = max(1, len(pairs))
        return Drift(sum(changed) / count, sum(kl) / count, ratio)


class Watch:
    """Everything that is watched, tokenised for one model; :meth:`read` reads it as the model is at the moment."""

    def __init__(self, lm: LM, watched: Watched) -> None:
        self.lm = lm
        self._prompts = tuple(prompt for prompt, _ in watched.prompts)
        self._texts = _as_texts(lm, watched.prompts)
        self._passage = _passage(lm, watched.passage)

    @torch.no_grad()
    def read(self) -> Reading:
        """The model's answers now, whatever is attached to it."""
        logits = tuple(self.lm.logits(self._texts))
        if self._passage is None:
            return Reading(self._prompts, logits, None)
        labels = torch.tensor(self._passage.labels, device=self.lm.device)
        found = self.lm.logits([self._passage])[0]
        return Reading(self._prompts, logits, float(token_nll(found, labels).mean()))


def _as_texts(lm: LM, prompts: Sequence[tuple[str, str]]) -> list[Text]:
    bare = lm.kind == "classifier"  # its answer is a class, whatever the prompt asks for
    texts = []
    for prompt, answer in prompts:
        known = answer and not bare
        texts += to_texts(lm, [(prompt, answer)]) if known else lm.prompt_texts([prompt])
    return texts


def _passage(lm: LM, passage: str) -> Text | None:
    if lm.kind != "causal" or not passage.strip():
        return None
    ids = lm.tokenizer(passage)["input_ids"][: lm.context]
    return Text(tuple(ids), 1) if len(ids) > 1 else None
