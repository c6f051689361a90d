"""An edit of weights: low-rank changes of a few matrices, and their origin.

::

    with edit.applied(lm) as edited:
        edited.generate("The capital of Australia is")

Edits are values: scaling, compacting, comparing and composing them gives new edits. The model is changed only by
:meth:`Edit.merge_`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from emendo._text import normalised
from emendo.edits._provenance import Origin, Request
from emendo.edits._weights import Merged, matrix_shape, merge, weight_norm
from emendo.edits.base import WEIGHTS, BaseEdit, edit_head
from emendo.errors import MismatchError, RequestError
from emendo.low_rank import LowRank, applied, from_tensors, to_tensors, total
from emendo.models._fingerprint import same_model
from emendo.models.lm import LM

__all__ = [
    "Attachment",
    "BaseEdit",
    "Edit",
    "Origin",
    "Request",
    "as_weights",
    "compose",
    "conflicts",
    "diff",
    "edit_head",
]

M = TypeVar("M", nn.Module, LM)


class Attachment:
    """An edit that is attached to a model until :meth:`detach` is called."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def detach(self) -> None:
        """Detach the edit. The model is bit for bit the same as before; calling this again does nothing."""
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
        deltas: module name -> the change of its weight.
    """

    kind: ClassVar[str] = WEIGHTS
    deltas: Mapping[str, LowRank]
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: nn.Module | LM) -> None:
        """Make sure that the edit belongs to this model, and that each change has the shape of its matrix.

        Raises:
            MismatchError: it belongs to another model.
        """
        super().check(model)
        module = _module(model)
        for name, delta in self.deltas.items():
            try:
                shape = matrix_shape(module.get_submodule(name))
            except AttributeError:
                raise MismatchError(f"This edit changes {name!r}, which the model does not have.") from None
            if shape is not None and shape != delta.shape:
                raise MismatchError(
                    f"This edit changes {name} by a matrix of {delta.shape[1]} x {delta.shape[0]}, but the model's has "
                    f"{shape[1]} x {shape[0]}."
                )

    def attach(self, model: nn.Module | LM) -> Attachment:
        """Attach the edit beside the model's matrices until the returned attachment is detached.

        Several edits can be attached at once, and detached in any order.

        Raises:
            MismatchError: the edit belongs to another model.
        """
        self.check(model)
        stack = ExitStack()
        stack.enter_context(applied(_module(model), self.deltas))
        return Attachment(stack)

    @contextmanager
    def applied(self, model: M) -> Iterator[M]:
        """Attach the edit for the length of a ``with`` block, which yields the model; see :meth:`attach`."""
        with self.attach(model):
            yield model

    def merge_(self, model: nn.Module | LM, *, keep: bool = True) -> Merged:
        """Add the edit to the weights themselves, in place.

        Args:
            model: the model to change. An :class:`~emendo.models.loading.LM` keeps its fingerprint.
            keep: keep the old tensors, so that ``restore()`` of the result puts them back bit for bit.

        Returns:
            The rounding error of the merge, and the way to undo it.

        Raises:
            MismatchError: the edit belongs to another model.
            ModelError: a matrix is quantised, so that nothing can be added to it.
            RequestError: the edit holds NaN or infinite numbers.
        """
        self.check(model)
        self.check_numbers()
        return merge(_module(model), self.deltas, keep=keep)

    @property
    def rank(self) -> int:
        """The highest rank among the sites."""
        return max(self.ranks.values(), default=0)

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
        """``||dW|| / ||W||`` (Frobenius) at each site; of a quantised matrix, ``W`` is the one it stands for.

        Infinite where ``W`` is zero.
        """
        module, found = _module(model), {}
        for name, norm in self.norms().items():
            size = weight_norm(module.get_submodule(name), self.deltas[name].shape)
            found[name] = norm / size if size else (float("inf") if norm else 0.0)
        return found

    def scale(self, factor: float) -> Self:
        """The edit with every change multiplied by ``factor``."""
        return replace(
            self,
            deltas={name: delta.scale(factor) for name, delta in self.deltas.items()},
            card={**self.card, "scaled_by": factor * self.card.get("scaled_by", 1.0)},
        )

    @torch.no_grad()
    def compact(self, rank: int | None = None, tolerance: float = 0.0) -> Self:
        """The nearest edit of lower rank, site by site (Eckart-Young).

        Args:
            rank: the highest rank of any site; by default as low as ``tolerance`` permits.
            tolerance: the largest error at each site, as ``||dW - dW'|| / ||dW||``.

        Returns:
            An edit whose card states the error under ``compacted``, over all sites and at the worst one.

        Raises:
            RequestError: the rank is below 1, or the tolerance negative.
        """
        if (rank is not None and rank < 1) or tolerance < 0:
            raise RequestError(
                f"An edit cannot have rank {rank} or an error of {tolerance}: give a rank of at least 1 and a "
                "tolerance of at least 0."
            )
        deltas = {name: delta.compact(rank, tolerance) for name, delta in self.deltas.items()}
        smaller = replace(self, deltas=deltas)
        errors = diff(self, smaller)
        worst = max((site.error for site in errors.sites.values()), default=0.0)
        note = {"rank": smaller.rank, "error": errors.error, "worst_site_error": worst}
        return replace(smaller, card={**self.card, "compacted": note})

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return to_tensors(self.deltas), {}

    @classmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        deltas = from_tensors(tensors)
        if not isinstance(card.get("scaled_by", 1.0), int | float):
            raise TypeError("scaled_by")
        for name, delta in deltas.items():
            check_factors(name, delta)
        return cls(deltas, origin, card)


def check_factors(name: str, delta: LowRank) -> None:
    """Make sure that two tensors from a file are the factors of one change.

    Raises:
        ValueError: they are not floating-point matrices ``[d_out, r]`` and ``[r, d_in]``.
    """
    left, right = delta.left, delta.right
    sound = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] > 0
    if not sound or not left.is_floating_point() or left.dtype != right.dtype:
        raise ValueError(
            f"{name}: factors of {left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
        )


def as_weights(edit: BaseEdit, purpose: str) -> Edit:
    """The edit as a change of weights, for what works on weights alone.

    Args:
        edit: an edit of any kind.
        purpose: the beginning of the error message, such as ``"A ledger keeps changes of weights"``.

    Raises:
        RequestError: the edit changes no weights.
    """
    if not isinstance(edit, Edit):
        raise RequestError(
            f"{purpose}; an edit of the kind {edit.kind!r} changes no weights. Apply it with edit.applied(lm) where "
            "the model is used."
        )
    return edit


def compose(edits: Sequence[Edit]) -> Edit:
    """Several edits as one: changes of the same matrix add up, and so do their ranks. Nothing is lost.

    Raises:
        RequestError: there are no edits.
        MismatchError: the edits belong to different models.
    """
    origin = common_origin(edits, "composed", {})
    return Edit(total(edit.deltas for edit in edits), origin)


def conflicts(edits: Iterable[BaseEdit]) -> dict[str, tuple[str, ...]]:
    """The prompts that are edited more than once, each with its targets in order.

    Prompts that differ only in case, white space or Unicode form are the same, and are named as in the first edit.
    Where edits of one fact are combined, neither may hold.
    """
    found: dict[str, list[Request]] = {}
    for edit in edits:
        for request in edit.origin.requests:
            found.setdefault(normalised(request.prompt), []).append(request)
    return {own[0].prompt: tuple(r.target for r in own) for own in found.values() if len(own) > 1}


def common_origin(edits: Sequence[BaseEdit], editor: str, settings: Mapping[str, Any]) -> Origin:
    """The origin of one edit that is made of several.

    Raises:
        RequestError: there are no edits.
        MismatchError: the edits belong to different models.
    """
    if not edits:
        raise RequestError("There is nothing to compose: give at least one edit.")
    first = edits[0].origin
    for edit in edits:
        if not same_model(edit.origin.fingerprint, first.fingerprint):
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
    """The difference of two edits at one matrix.

    Attributes:
        first: ``||A||`` (Frobenius), 0 where the first edit does not change the matrix.
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
        """The cosine of the angle between the two changes; 0 where one of them is zero."""
        size = self.first * self.second
        return (self.first**2 + self.second**2 - self.between**2) / (2 * size) if size else 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two edits.

    Attributes:
        sites: by module name, for each matrix that either edit changes.
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
    """The difference of two edits, matrix by matrix."""
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
