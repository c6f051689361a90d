"""Models under several edits at once: how evaluation makes edits and asks the edited models.

Every text or prompt stands under one of several edits, each made from the clean model. Edits that change weights share
their passes: each row of a batch has the change of its own edit. Edits that change no weights are asked one by one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from emendo.editors.base import Editor
from emendo.edits.edit import BaseEdit, Request
from emendo.errors import RequestError
from emendo.low_rank import Change, Deltas, LowRank, RowGroups, applied
from emendo.models.lm import LM
from emendo.models.text import Text, collate, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

T = TypeVar("T")

FORCED_TOKENS = 1024
"""Padded tokens of a teacher-forced batch; its logits take most of the memory."""

_Passes = Callable[[Sequence[Text]], list[Tensor]]
"""Texts to the logits ``[labels, vocabulary]`` of each."""
_Changes = Mapping[str, "LowRank | Change"]


@dataclass(frozen=True, eq=False)
class EditedModels(ABC):
    """Several edits, ready to be asked.

    Attributes:
        seconds: time to make them.
        deltas: by site name, the change of each edit, ``[edits, d_out, r]`` and ``[edits, r, d_in]``; None where no
            weights change.
        shared: whether texts under different edits share their passes.
    """

    shared: ClassVar[bool]
    seconds: float
    deltas: Deltas | None

    @abstractmethod
    def logits(self, rows: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        """The logits ``[labels, vocabulary]`` at the label positions of each text.

        Args:
            rows: the edit of each text.
            texts: the texts.

        Raises:
            RequestError: an edit leaves no room for a text in the model's context.
        """

    @abstractmethod
    def generate(self, rows: Sequence[int], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt.

        Args:
            rows: the edit of each prompt.
            prompts: the prompts.
            max_new_tokens: the number of tokens to generate, at most.

        Raises:
            RequestError: an edit leaves no room for a prompt in the model's context.
        """


def make_edits(
    lm: LM, editor: Editor, groups: Sequence[Sequence[Request]], store: TrunkCache
) -> EditedModels:
    """Make one edit for each group of requests, every one of them from the clean model.

    Args:
        lm: the model; it is not changed.
        editor: makes the edits.
        groups: the requests of each edit.
        store: the cache of the trunk's outputs; the trunk ends below the editor's first site.

    Raises:
        MismatchError: the editor was trained for another model.
        RequestError: an edit without a request, or one that does not fit the model.
    """
    start = _now(lm)
    with torch.enable_grad():
        if editor.no_changes:
            edits = [editor.edit(lm, list(group)) for group in groups]
            return _BesideWeights(_now(lm) - start, None, lm, edits)
        deltas = _deltas(lm, editor, groups)
    seconds, host = _now(lm) - start, editor.host(lm)
    changes_of = _changes_of(deltas, host.model.dtype)
    return _InWeights(seconds, deltas, host, _passes(lm, host, editor, store), changes_of)


def with_clean_row(edited: EditedModels) -> EditedModels:
    """The same edits, and after them one that changes nothing.

    Raises:
        RequestError: they change no weights.
    """
    if not isinstance(edited, _InWeights) or edited.deltas is None:
        raise RequestError("Only edits of weights can be routed.")
    deltas = {
        name: LowRank(*(pad(side, (0, 0, 0, 0, 0, 1)) for side in (delta.left, delta.right)))
        for name, delta in edited.deltas.items()
    }
    return replace(edited, deltas=deltas, changes_of=_changes_of(deltas, edited.host.model.dtype))


def existing_change(
    lm: LM, editor: Editor, state: Mapping[str, Tensor], seconds: float, store: TrunkCache
) -> EditedModels:
    """One change that has been made already: the sum of the edits of a sequence.

    Args:
        lm: the clean model.
        editor: made the edits.
        state: the dense change ``[d_out, d_in]`` of each site.
        seconds: time to make the last edit.
        store: as for :func:`make_edits`.
    """
    host = editor.host(lm)
    change = {name: LowRank.from_dense(dense) for name, dense in state.items()}
    deltas = {name: LowRank(d.left[None], d.right[None]) for name, d in change.items()}
    return _InWeights(seconds, deltas, host, _passes(lm, host, editor, store), lambda rows: change)


def _now(lm: LM) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


def _deltas(lm: LM, editor: Editor, groups: Sequence[Sequence[Request]]) -> dict[str, LowRank]:
    """One change for each group, by site name, without a graph."""
    if all(len(group) == 1 for group in groups):
        deltas = editor.each(lm, [request for group in groups for request in group])
    else:
        changes = [editor.together(lm, group) for group in groups]
        deltas = {name: LowRank.stack([change[name] for change in changes]) for name in changes[0]}
    return {name: LowRank(delta.left.detach(), delta.right.detach()) for name, delta in deltas.items()}


def _changes_of(deltas: Deltas, dtype: torch.dtype) -> Callable[[Sequence[int]], _Changes]:
    """The changes for the rows of a batch, from the edit of each row."""
    low = all(delta.is_compact for delta in deltas.values())  # each text can have a copy of the factors
    return _low_rank(deltas) if low else _dense(deltas, dtype)


def _low_rank(deltas: Deltas) -> Callable[[Sequence[int]], _Changes]:
    def changes_of(rows: Sequence[int]) -> _Changes:
        index = torch.tensor(rows, device=next(iter(deltas.values())).left.device)
        return {name: delta.take(index) for name, delta in deltas.items()}

    return changes_of


def _dense(deltas: Deltas, dtype: torch.dtype) -> Callable[[Sequence[int]], _Changes]:
    """Changes without copies: the rows under one edit are multiplied together."""

    def changes_of(rows: Sequence[int]) -> _Changes:
        groups = [(row, [i for i, other in enumerate(rows) if other == row]) for row in sorted(set(rows))]
        return {
            name: RowGroups(len(rows), [(members, delta[row].to(dtype).__call__) for row, members in groups])
            for name, delta in deltas.items()
        }

    return changes_of


def _passes(lm: LM, host: LM, editor: Editor, store: TrunkCache) -> _Passes:
    """Passes through the model that the changes belong to, from cached trunk outputs where it shares the trunk."""
    kept, trunk = editor.host_cache(lm, store), Trunk(host.model, editor.sites)

    def passes(texts: Sequence[Text]) -> list[Tensor]:
        if kept is None:
            logits = trunk.logits(collate(texts))
        else:
            store.ensure(texts)
            logits = kept.logits(texts)[1]
        return list(logits.split([len(text.labels) for text in texts]))

    return passes


@dataclass(frozen=True, eq=False)
class _InWeights(EditedModels):
    """Changes of weights, all of them in one batch.

    Attributes:
        host: the model that the changes belong to.
        passes: teacher-forced passes through it.
        changes_of: the changes for the rows of a batch, from the edit of each row.
    """

    shared = True
    host: LM
    passes: _Passes
    changes_of: Callable[[Sequence[int]], _Changes]

    @torch.no_grad()
    def logits(self, rows: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for part in length_buckets(range(len(texts)), lambda i: texts[i].size, FORCED_TOKENS):
            with applied(self.host.model, self.changes_of([rows[i] for i in part])):
                found |= zip(part, self.passes([texts[i] for i in part]), strict=True)
        return [found[i] for i in range(len(texts))]

    @torch.no_grad()
    def generate(self, rows: Sequence[int], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        if self.host.kind == "classifier":
            logits = self.logits(rows, self.host.prompt_texts(list(prompts)))
            return [self.host.labels[int(classes[0].argmax())] for classes in logits]
        with applied(self.host.model, self.changes_of(rows)):
            return self.host.generate(list(prompts), max_new_tokens)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class _BesideWeights(EditedModels):
    """Edits that change no weights, each asked by itself."""

    shared = False
    lm: LM
    edits: Sequence[BaseEdit]

    @torch.no_grad()
    def logits(self, rows: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        return self._each(rows, lambda lm, members: lm.logits([texts[i] for i in members]))

    @torch.no_grad()
    def generate(self, rows: Sequence[int], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._each(
            rows, lambda lm, members: lm.generate([prompts[i] for i in members], max_new_tokens)
        )

    def _each(self, rows: Sequence[int], ask: Callable[[LM, list[int]], list[T]]) -> list[T]:
        """The answers to all rows, edit by edit."""
        found: dict[int, T] = {}
        for row in sorted(set(rows)):
            members = [i for i, other in enumerate(rows) if other == row]
            with self.edits[row].applied(self.lm) as edited:
                found |= zip(members, ask(edited, members), strict=True)
        return [found[i] for i in range(len(rows))]
