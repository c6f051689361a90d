"""Asking edited models: the one way in which evaluation makes edits and looks at what they do.

Every text or prompt is asked under one of several edits, each made from the clean model. Changes of low rank are asked
together: each row of a batch stands under its own. Other edits, dense changes of weights among them, are asked one by
one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emendo.editors.base import Editor
from emendo.edits.edit import BaseEdit, Request
from emendo.low_rank import Deltas, LowRank, applied
from emendo.models.lm import LM
from emendo.models.text import Text, collate, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

FORCED_TOKENS = 1024
"""Padded tokens of a teacher-forced batch: its logits are what takes memory."""

_Passes = Callable[[Sequence[Text]], list[Tensor]]
"""Texts to the logits ``[labels, vocabulary]`` of each."""


@dataclass(frozen=True, eq=False)
class EditedModels(ABC):
    """Several edits, ready to be asked.

    Attributes:
        seconds: time that making them took.
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
            rows: the edit that each text stands under.
            texts: the texts.

        Raises:
            RequestError: an edit leaves no room for a text in the model's context.
        """

    @abstractmethod
    def generate(self, rows: Sequence[int], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt.

        Args:
            rows: the edit that each prompt stands under.
            prompts: the prompts.
            max_new_tokens: how many tokens to write, at most.

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
        store: keeps the trunk's outputs of the model's texts; the trunk ends below the editor's first site.

    Raises:
        MismatchError: the editor was trained for another model.
        RequestError: an edit without a request, or one that does not fit the model.
    """
    start = _now(lm)
    with torch.enable_grad():
        if not editor.makes.changes_weights:
            edits = [editor.edit(lm, list(group)) for group in groups]
            return _OneByOne(_now(lm) - start, None, lambda row: _beside(lm, edits[row]))
        deltas = _changes(lm, editor, groups)
    seconds, host = _now(lm) - start, editor.host(lm)
    passes = _passes(lm, host, editor, store)
    if all(_is_low(delta) for delta in deltas.values()):
        return _Together(seconds, deltas, host, passes)
    return _OneByOne(seconds, deltas, lambda row: _hooked(host, deltas, row, passes))


def existing_edit(
    lm: LM, editor: Editor, state: Mapping[str, Tensor] | BaseEdit, seconds: float, store: TrunkCache
) -> EditedModels:
    """One edit that is there already, ready to be asked: what many edits one after the other have added up to.

    Args:
        lm: the clean model.
        editor: what made it.
        state: the dense change ``[d_out, d_in]`` of each site, or an edit that changes no weights.
        seconds: time that the last edit took.
        store: as for :func:`make_edits`.
    """
    if isinstance(state, BaseEdit):
        edit = state
        return _OneByOne(seconds, None, lambda row: _beside(lm, edit))
    host = editor.host(lm)
    deltas = {name: LowRank.from_dense(change[None]) for name, change in state.items()}
    passes = _passes(lm, host, editor, store)
    return _OneByOne(seconds, deltas, lambda row: _hooked(host, deltas, row, passes))


def _now(lm: LM) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


def _changes(lm: LM, editor: Editor, groups: Sequence[Sequence[Request]]) -> dict[str, LowRank]:
    """One change for each group, by site name, without a graph."""
    if all(len(group) == 1 for group in groups):
        deltas = editor.each(lm, [request for group in groups for request in group])
    else:
        changes = [editor.together(lm, group) for group in groups]
        deltas = {name: LowRank.stack([change[name] for change in changes]) for name in changes[0]}
    return {name: LowRank(delta.left.detach(), delta.right.detach()) for name, delta in deltas.items()}


def _is_low(delta: LowRank) -> bool:
    """Whether a copy of the factors for each text takes less than one of the matrix would."""
    d_out, d_in = delta.left.shape[-2], delta.right.shape[-1]
    return delta.rank * (d_out + d_in) < d_out * d_in


def _passes(lm: LM, host: LM, editor: Editor, store: TrunkCache) -> _Passes:
    """Passes through the model that the changes belong to, from the trunk's outputs where these are its own."""
    if host is lm:
        kept: TrunkCache | None = store
    else:
        trunk = Trunk(host.model, editor.sites)
        kept = store.with_trunk(trunk) if editor.shares_trunk else None

    def passes(texts: Sequence[Text]) -> list[Tensor]:
        if kept is None:
            logits = trunk.logits(collate(texts))
        else:
            store.ensure(texts)
            logits = kept.logits(texts)[1]
        return list(logits.split([len(text.labels) for text in texts]))

    return passes


@dataclass(frozen=True, eq=False)
class _Together(EditedModels):
    """Low-rank changes, all of them in one batch."""

    shared = True
    host: LM
    passes: _Passes

    @torch.no_grad()
    def logits(self, rows: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for part in length_buckets(range(len(texts)), lambda i: texts[i].size, FORCED_TOKENS):
            with applied(self.host.model, self._take([rows[i] for i in part])):
                found |= zip(part, self.passes([texts[i] for i in part]), strict=True)
        return [found[i] for i in range(len(texts))]

    @torch.no_grad()
    def generate(self, rows: Sequence[int], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        if self.host.kind == "classifier":
            logits = self.logits(rows, self.host.prompt_texts(list(prompts)))
            return [self.host.labels[int(classes[0].argmax())] for classes in logits]
        with applied(self.host.model, self._take(rows)):
            return self.host.generate(list(prompts), max_new_tokens)  # type: ignore[no-any-return]

    def _take(self, rows: Sequence[int]) -> dict[str, LowRank]:
        assert self.deltas is not None
        return {
            name: delta.take(torch.tensor(rows, device=delta.left.device))
            for name, delta in self.deltas.items()
        }


_Ways = tuple[_Passes, Callable[[list[str], int], list[str]]]
"""How a model under one edit gives logits, and how it generates."""


@dataclass(frozen=True, eq=False)
class _OneByOne(EditedModels):
    """Edits of any kind, each asked by itself."""

    shared = False
    under: Callable[[int], AbstractContextManager[_Ways]]

    @torch.no_grad()
    def logits(self, rows: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for row, members in _by_row(rows):
            with self.under(row) as (passes, _):
                for part in length_buckets(members, lambda i: texts[i].size, FORCED_TOKENS):
                    found |= zip(part, passes([texts[i] for i in part]), strict=True)
        return [found[i] for i in range(len(texts))]

    @torch.no_grad()
    def generate(self, rows: Sequence[int], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        found: dict[int, str] = {}
        for row, members in _by_row(rows):
            with self.under(row) as (_, generate):
                answers = generate([prompts[i] for i in members], max_new_tokens)
                found |= zip(members, answers, strict=True)
        return [found[i] for i in range(len(prompts))]


def _by_row(rows: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Each edit that is asked, and the places where it is."""
    for row in sorted(set(rows)):
        yield row, [i for i, other in enumerate(rows) if other == row]


@contextmanager
def _beside(lm: LM, edit: BaseEdit) -> Iterator[_Ways]:
    """An edit that changes no weights."""
    with edit.applied(lm) as edited:
        yield edited.logits, edited.generate


@contextmanager
def _hooked(host: LM, deltas: Deltas, row: int, passes: _Passes) -> Iterator[_Ways]:
    """One of several changes of weights."""
    with applied(host.model, {name: delta[row] for name, delta in deltas.items()}):
        yield passes, host.generate
