"""The guard: what an edit must do, and what it must not, before a ledger takes it.

Every figure is taken on the model as the edit finds it, with all earlier edits attached, and again with this one; the
drift is also taken from the clean model, so that many small changes are seen too. The limits' defaults were found by
measurement (docs/ledger.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

import torch

from emendo.edits.edit import Edit
from emendo.errors import EmendoError, RequestError
from emendo.ledger._schema import Entry, Operation
from emendo.ledger._stack import Stack
from emendo.ledger.watch import Drift, Reading, Watch, Watched
from emendo.models.lm import LM
from emendo.models.tokenization import to_texts


@dataclass(frozen=True, slots=True)
class Limits:
    """What the guard lets pass.

    Attributes:
        reached: the least share of the edit's requests whose whole target is the most likely answer.
        reworded: the least share of the rewordings, where any are given.
        changed: the largest share of watched prompts that the edit gives another answer.
        kl: the largest mean KL of their answers, in nats, before against after the edit.
        perplexity: the largest ratio of the passage's perplexity, after to before the edit.
        norm: the largest ``||dW|| / ||W||`` of any matrix.
        total_changed: as ``changed``, for all edits together, from the clean model.
        total_kl: as ``kl``, for all edits together.
        total_perplexity: as ``perplexity``, for all edits together.
    """

    reached: float = 1.0
    reworded: float = 0.5
    changed: float = 0.3
    kl: float = 0.25
    perplexity: float = 1.2
    norm: float = 0.5
    total_changed: float = 0.5
    total_kl: float = 0.75
    total_perplexity: float = 1.5

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) >= 0:
                raise RequestError(f"A limit cannot be negative: {each.name}={getattr(self, each.name)}.")


_LEAST = ("reached", "reworded")
_WORDS = {
    "reached": "the edit's target is the answer to {value:.0%} of its prompts",
    "reworded": "its target is the answer to {value:.0%} of the rewordings",
    "changed": "{value:.1%} of the watched prompts get another answer",
    "kl": "the watched answers move by {value:.3g} nats (KL)",
    "perplexity": "the perplexity of plain text grows {value:.3g}-fold",
    "norm": "a matrix changes by {value:.1%} of its size",
    "total_changed": "{value:.1%} of the watched prompts differ from the clean model",
    "total_kl": "the watched answers are {value:.3g} nats (KL) from the clean model",
    "total_perplexity": "the perplexity of plain text is {value:.3g} times the clean model's",
}


@dataclass(frozen=True, slots=True)
class Health:
    """What an edit does and does not, by the names of :class:`Limits`; None where it was not measured."""

    reached: float
    reworded: float | None
    changed: float
    kl: float
    perplexity: float | None
    norm: float
    total_changed: float
    total_kl: float
    total_perplexity: float | None

    @classmethod
    def of(cls, reached: float, reworded: float | None, norm: float, own: Drift, total: Drift) -> Health:
        """From the edit's own drift and that of all edits."""
        drifts = {**asdict(own), **{f"total_{name}": value for name, value in asdict(total).items()}}
        return cls(reached=reached, reworded=reworded, norm=norm, **drifts)

    def problems(self, limits: Limits) -> list[str]:
        """What is beyond the limits, in words; empty for an edit that may pass."""
        found = []
        for name, words in _WORDS.items():
            value, limit = getattr(self, name), getattr(limits, name)
            if value is None:
                continue
            least = name in _LEAST
            if not (value >= limit if least else value <= limit):  # so that NaN does not pass
                found.append(f"{words.format(value=value)} ({'at least' if least else 'at most'} {limit:g})")
        return found

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class RefusedError(EmendoError, RuntimeError):
    """The guard refused an edit.

    Attributes:
        health: the figures.
        problems: what is beyond the limits.
    """

    def __init__(self, health: Health, problems: Sequence[str]) -> None:
        super().__init__(
            "The guard refuses this edit: "
            + "; ".join(problems)
            + ". Nothing was applied. With --force it is applied "
            "all the same, and the ledger says so."
        )
        self.health, self.problems = health, list(problems)


def reached(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """For each prompt whether its whole target is the most likely answer, teacher forced, as the model is now.

    Raises:
        RequestError: a text that does not fit the model.
    """
    texts = to_texts(lm, pairs)
    return [
        bool((logits.argmax(-1).cpu() == torch.tensor(text.labels)).all())
        for text, logits in zip(texts, lm.logits(texts), strict=True)
    ]


def largest_norm(edit: Edit, lm: LM) -> float:
    """The largest ``||dW|| / ||W||`` of any matrix."""
    return max(edit.relative_norms(lm).values(), default=0.0)


class Guard:
    """Measures edits on top of others.

    Args:
        stack: the model and the ledger's edits.
        watched: what must not change.
    """

    def __init__(self, stack: Stack, watched: Watched) -> None:
        self.stack = stack
        self._watch = Watch(stack.lm, watched)
        self._readings: dict[tuple[str, ...], Reading] = {}

    @torch.no_grad()
    def health(self, active: Sequence[int], edit: Edit, paraphrases: Sequence[str] = ()) -> Health:
        """The figures of an edit on top of the ledger's edits of the given numbers.

        Raises:
            MismatchError: it was made for another model.
            RequestError: rewordings for an edit of several requests, or a text that does not fit the model.
        """
        lm, requests = self.stack.lm, edit.origin.requests
        edit.check(lm)
        if paraphrases and len(requests) != 1:
            raise RequestError(f"Rewordings belong to an edit of one request; this one has {len(requests)}.")
        entries = self.stack.ledger.entries(active)
        before, clean = self._reading(active), self._reading(())
        reader = lm.reading(chat=edit.origin.chat)
        with self.stack.under(active, edit):
            right = reached(reader, [(r.prompt, r.target) for r in requests])
            reworded = reached(reader, [(text, requests[0].target) for text in paraphrases])
            after = self._keep((*(entry.digest for entry in entries), edit.digest))
        asked = {request["prompt"] for entry in entries for request in entry.requests}
        asked |= {*(request.prompt for request in requests), *paraphrases}
        return Health.of(
            reached=fmean(map(float, right)) if right else 1.0,
            reworded=fmean(map(float, reworded)) if reworded else None,
            norm=largest_norm(edit, lm),
            own=after.drift(before, asked),
            total=after.drift(clean, asked),
        )

    @torch.no_grad()
    def examine(self, operation: Operation) -> Examination:
        """Every edit that was active after an operation asked again, and everything that is watched."""
        entries = self.stack.ledger.entries(operation.active)
        with self.stack.under(operation.active):
            right = self._reached(entries)
        holdings = tuple(Holding(entry, tuple(right[entry.id])) for entry in entries)
        asked = {request["prompt"] for entry in entries for request in entry.requests}
        drift = self._reading(operation.active).drift(self._reading(()), asked)
        return Examination(operation.id, holdings, drift)

    def _reached(self, entries: Sequence[Entry]) -> dict[int, list[bool]]:
        """For each edit's number which of its targets are reached as the model is now, asked as the edit was made."""
        found: dict[int, list[bool]] = {}
        for chat in (False, True):
            own = [entry for entry in entries if self.stack.edit(entry.id).origin.chat == chat]
            pairs = [(r["prompt"], r["target"]) for entry in own for r in entry.requests]
            right = iter(reached(self.stack.lm.reading(chat=chat), pairs) if own else ())
            found |= {entry.id: [next(right) for _ in entry.requests] for entry in own}
        return found

    def _reading(self, active: Sequence[int]) -> Reading:
        """What is watched, under the ledger's edits of the given numbers."""
        key = tuple(entry.digest for entry in self.stack.ledger.entries(active))
        if key in self._readings:
            return self._readings[key]
        with self.stack.under(active):
            return self._keep(key)

    def _keep(self, key: tuple[str, ...]) -> Reading:
        """What is watched, as the model is now; the clean model's reading and the last two others are kept."""
        reading = self._watch.read()
        others = [other for other in self._readings if other]
        self._readings = {
            other: self._readings[other] for other in ((), *others[-1:]) if other in self._readings
        }
        self._readings[key] = reading
        return reading


# --------------------
# What became of a whole stack of edits, and of everything else.


@dataclass(frozen=True, slots=True)
class Holding:
    """Whether an edit still does what it was made for.

    Attributes:
        entry: the edit.
        reached: for each of its requests, whether its target is the most likely answer.
    """

    entry: Entry
    reached: tuple[bool, ...]

    @property
    def holds(self) -> bool:
        """Whether all of its targets are reached."""
        return all(self.reached)


@dataclass(frozen=True, slots=True)
class Examination:
    """The whole stack of edits, measured.

    Attributes:
        operation: the state that was measured.
        holdings: the active edits in their order.
        drift: of everything that is watched, from the clean model.
    """

    operation: int
    holdings: tuple[Holding, ...]
    drift: Drift

    @property
    def retention(self) -> float:
        """Share of the requests whose target is still the answer; 1 where there is none."""
        return fmean([float(right) for h in self.holdings for right in h.reached] or [1.0])

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "edits": len(self.holdings),
            "retention": self.retention,
            "lost": [h.entry.id for h in self.holdings if not h.holds],
            "drift": asdict(self.drift),
        }
