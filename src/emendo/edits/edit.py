"""An edit of weights: low-rank changes of a few matrices, and where they came from.

::

    with edit.applied(lm) as edited:
        edited.generate("The capital of Australia is")

Edits are values: they can be scaled, made smaller, compared and put together, and each of these gives a new edit. The
model is never changed, unless it is asked for by name (:meth:`Edit.merge_`). Edits of every kind share
:class:`~emendo.edits.base.BaseEdit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from emendo.edits.base import WEIGHTS, BaseEdit, edit_head
from emendo.edits.merging import Merged, merge
from emendo.edits.provenance import Origin, Request
from emendo.errors import MismatchError, RequestError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM

__all__ = ["Attachment", "BaseEdit", "Edit", "Origin", "Request", "compose", "diff", "edit_head"]

M = TypeVar("M", nn.Module, LM)


class Attachment:
    """An edit attached to a model; :meth:`detach` takes it off, once and for all."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def detach(self) -> None:
        """Take the edit off. The model is bit for bit what it was; calling it again does nothing."""
        self._stack.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@dataclass(frozen=True, eq=False)
class Edit(BaseEdit):
    """A change of a model's weights: ``dW = left @ right`` at each site.

    Attributes:
        deltas: module name -> its change.
    """

    kind: ClassVar[str] = WEIGHTS
    deltas: Mapping[str, LowRank]
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, model: nn.Module | LM) -> Attachment:
        """Add the edit beside the model's matrices until the returned attachment is detached.

        Several edits may be attached at once, and taken off in any order.

        Raises:
            MismatchError: the model is not the one that the edit was made for.
        """
        self.check(model)
        stack = ExitStack()
        stack.enter_context(applied(_module(model), self.deltas))
        return Attachment(stack)

    @contextmanager
    def applied(self, model: M) -> Iterator[M]:
        """The edit attached for the length of a ``with`` block, which is given the model; see :meth:`attach`."""
        with self.attach(model):
            yield model

    def merge_(self, model: nn.Module | LM, *, keep: bool = True) -> Merged:
        """Add the edit to the weights themselves, in place.

        Args:
            model: whose weights are changed. An :class:`~emendo.models.loading.LM` keeps the fingerprint it had.
            keep: keep the old tensors, so that ``restore()`` of what is returned puts them back bit for bit.

        Returns:
            What the merge lost in the weights' number format, and the way back.

        Raises:
            MismatchError: the model is not the one that the edit was made for.
            ModelError: a matrix is quantised, so that it cannot take the change.
        """
        self.check(model)
        return merge(_module(model), self.deltas, keep=keep)

    @property
    def rank(self) -> int:
        """The highest rank among the sites."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank at each site."""
        return {name: delta.rank for name, delta in self.deltas.items()}

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """``||dW||`` (Frobenius) at each site."""
        return {name: float(delta.norm()) for name, delta in self.deltas.items()}

    @torch.no_grad()
    def relative_norms(self, model: nn.Module | LM) -> dict[str, float]:
        """``||dW|| / ||W||`` (Frobenius) at each site."""
        module = _module(model)
        return {
            name: norm / float(_weight(module, name).double().norm()) for name, norm in self.norms().items()
        }

    def scale(self, factor: float) -> Self:
        """The edit with every change ``factor`` times as large."""
        return replace(
            self,
            deltas={name: delta.scale(factor) for name, delta in self.deltas.items()},
            card={**self.card, "scaled_by": factor * self.card.get("scaled_by", 1.0)},
        )

    @torch.no_grad()
    def compact(self, rank: int | None = None, tolerance: float = 0.0) -> Self:
        """The nearest edit of lower rank, site by site (Eckart-Young).

        Args:
            rank: the most columns of any site; by default as many as ``tolerance`` asks for.
            tolerance: what may be lost at each site, as ``||dW - dW'|| / ||dW||``.

        Returns:
            An edit whose card says under ``compacted`` what was lost over all sites together and at the worst one.

        Raises:
            RequestError: a rank below 1, or a negative tolerance.
        """
        if (rank is not None and rank < 1) or tolerance < 0:
            raise RequestError(
                f"An edit cannot have rank {rank} or be off by {tolerance}; give at least 1, or 0."
            )
        deltas = {name: delta.compact(rank, tolerance) for name, delta in self.deltas.items()}
        smaller = replace(self, deltas=deltas)
        errors = diff(self, smaller)
        worst = max((site.error for site in errors.sites.values()), default=0.0)
        note = {"rank": smaller.rank, "error": errors.error, "worst_site_error": worst}
        return replace(smaller, card={**self.card, "compacted": note})

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        factors = {}
        for name, delta in self.deltas.items():
            factors[f"{name}.left"] = delta.left
            factors[f"{name}.right"] = delta.right
        return factors, {}

    @classmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
        deltas = {name: LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}
        return cls(deltas, origin, card)


def compose(edits: Sequence[Edit]) -> Edit:
    """Several edits as one: changes of the same matrix add up, and so do their ranks. Nothing is lost.

    Raises:
        RequestError: no edit at all.
        MismatchError: the edits were made for different models.
    """
    origin = common_origin(edits, "composed", {})
    parts: dict[str, list[LowRank]] = {}
    for edit in edits:
        for name, delta in edit.deltas.items():
            parts.setdefault(name, []).append(delta)
    return Edit({name: LowRank.concatenate(deltas) for name, deltas in parts.items()}, origin)


def common_origin(edits: Sequence[Edit], editor: str, settings: Mapping[str, Any]) -> Origin:
    """Where one edit comes from that several were made into.

    Raises:
        RequestError: no edit at all.
        MismatchError: the edits were made for different models.
    """
    if not edits:
        raise RequestError("There is nothing to compose: give at least one edit.")
    first = edits[0].origin
    for edit in edits:
        if edit.origin.fingerprint != first.fingerprint:
            raise MismatchError(
                f"Edits of different models cannot be composed: {first.model!r} ({first.fingerprint}) and "
                f"{edit.origin.model!r} ({edit.origin.fingerprint})."
            )
    return Origin(
        fingerprint=first.fingerprint,
        model=first.model,
        editor=editor,
        settings={"of": [edit.digest for edit in edits], **settings},
        requests=tuple(request for edit in edits for request in edit.origin.requests),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        chat=all(edit.origin.chat for edit in edits),
    )


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """How two edits differ at one matrix.

    Attributes:
        first: ``||A||`` (Frobenius), 0 where the first edit leaves the matrix alone.
        second: ``||B||``.
        between: ``||A - B||``.
    """

    first: float
    second: float
    between: float

    @property
    def error(self) -> float:
        """``||A - B|| / ||A||``; infinite where only the second edit changes the matrix."""
        return self.between / self.first if self.first else (float("inf") if self.between else 0.0)

    @property
    def cosine(self) -> float:
        """Of the angle between the two changes; 0 where one of them is none."""
        size = self.first * self.second
        return (self.first**2 + self.second**2 - self.between**2) / (2 * size) if size else 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """How two edits differ.

    Attributes:
        sites: by module name, over the matrices that either of them changes.
    """

    sites: Mapping[str, SiteDifference]

    @property
    def error(self) -> float:
        """``||A - B|| / ||A||`` over all matrices together."""
        size = sum(site.first**2 for site in self.sites.values())
        between = sum(site.between**2 for site in self.sites.values())
        return (between / size) ** 0.5 if size else (float("inf") if between else 0.0)


@torch.no_grad()
def diff(a: Edit, b: Edit) -> Difference:
    """How two edits differ, matrix by matrix."""
    sites = {}
    for name in dict.fromkeys([*a.deltas, *b.deltas]):
        one, other = a.deltas.get(name), b.deltas.get(name)
        between = (one + other.scale(-1.0)) if one and other else (one or other)
        assert between is not None
        sites[name] = SiteDifference(
            float(one.norm()) if one else 0.0, float(other.norm()) if other else 0.0, float(between.norm())
        )
    return Difference(sites)


def _module(model: nn.Module | LM) -> nn.Module:
    return model.model if isinstance(model, LM) else model


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
