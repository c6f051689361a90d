"""The figures of an edit, and the limits beyond which the guard refuses it.

The defaults of the limits were found by measurement (docs/ledger.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from emendo.errors import EmendoError, RequestError

STORED_NAMES: Mapping[str, str] = {"edit_success": "reached", "paraphrase_success": "reworded"}
"""Figures whose names in the ledger, in ``--json`` and in old options differ from their names here."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The difference between two states of a model on the probes.

    Attributes:
        changed: share of the prompts where the most likely token differs anywhere in the answer.
        kl: KL(before || after) in nats, averaged over the tokens of each answer, then over the prompts.
        perplexity: perplexity of the passage, after / before; None without a passage.
    """

    changed: float
    kl: float
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the guard.

    Attributes:
        edit_success: smallest share of the edit's requests whose whole target is the most likely answer.
        paraphrase_success: smallest share of the paraphrases, if there are any.
        changed: largest share of the probes whose answer the edit changes.
        kl: largest mean KL on the probes, in nats, before against after the edit.
        perplexity: largest ratio of the passage's perplexity, after to before the edit.
        norm: largest ``||dW|| / ||W||`` of any matrix.
        total_changed: like ``changed``, for all edits together, from the base model.
        total_kl: like ``kl``, for all edits together.
        total_perplexity: like ``perplexity``, for all edits together.
    """

    edit_success: float = 1.0
    paraphrase_success: float = 0.5
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

    def as_dict(self) -> dict[str, float]:
        """As JSON values, by the stored names."""
        return _stored(self)


_LOWER_BOUNDS = ("edit_success", "paraphrase_success")
_MESSAGES = {
    "edit_success": "the target is the answer to {value:.0%} of the edit's prompts",
    "paraphrase_success": "the target is the answer to {value:.0%} of the paraphrases",
    "changed": "{value:.1%} of the probes get another answer",
    "kl": "the answers to the probes move by {value:.3g} nats (KL)",
    "perplexity": "the perplexity of plain text grows {value:.3g}-fold",
    "norm": "a matrix changes by {value:.1%} of its size",
    "total_changed": "{value:.1%} of the probes have another answer than in the base model",
    "total_kl": "the answers to the probes are {value:.3g} nats (KL) from those of the base model",
    "total_perplexity": "the perplexity of plain text is {value:.3g} times that of the base model",
}


@dataclass(frozen=True, slots=True)
class Health:
    """The figures of an edit, by the names of :class:`Limits`; None where nothing was measured."""

    edit_success: float
    paraphrase_success: float | None
    changed: float
    kl: float
    perplexity: float | None
    norm: float
    total_changed: float
    total_kl: float
    total_perplexity: float | None

    @classmethod
    def of(
        cls, edit_success: float, paraphrase_success: float | None, norm: float, own: Drift, total: Drift
    ) -> Health:
        """From the edit's own drift and that of all edits together."""
        drifts = {**asdict(own), **{f"total_{name}": value for name, value in asdict(total).items()}}
        return cls(edit_success=edit_success, paraphrase_success=paraphrase_success, norm=norm, **drifts)

    def problems(self, limits: Limits) -> list[str]:
        """The figures beyond the limits, in words; empty for an edit that passes."""
        found = []
        for name, message in _MESSAGES.items():
            value, limit = getattr(self, name), getattr(limits, name)
            if value is None:
                continue
            lower = name in _LOWER_BOUNDS
            if not (value >= limit if lower else value <= limit):  # so that NaN does not pass
                found.append(
                    f"{message.format(value=value)} ({'at least' if lower else 'at most'} {limit:g})"
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, by the stored names."""
        return _stored(self)


def _stored(figures: Any) -> dict[str, Any]:
    return {STORED_NAMES.get(name, name): value for name, value in asdict(figures).items()}


def read_figures(stored: Any) -> dict[str, float]:
    """The numbers of a health or of limits that a ledger stores, by their present names; anything else is left out."""
    if not isinstance(stored, Mapping):
        return {}
    values = {name: stored.get(STORED_NAMES.get(name, name), stored.get(name)) for name in _MESSAGES}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class RefusedError(EmendoError, RuntimeError):
    """The guard refused an edit.

    Attributes:
        health: the figures.
        problems: those beyond the limits, in words.
    """

    def __init__(self, health: Health, problems: Sequence[str]) -> None:
        super().__init__(
            f"The guard refuses this edit: {'; '.join(problems)}. Nothing was applied. With --force it is applied "
            "anyway, and the ledger records that."
        )
        self.health, self.problems = health, list(problems)
