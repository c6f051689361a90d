"""Edits on and off per request: each row of a batch under its own set of edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from emendo.edits.edit import Edit, compose
from emendo.errors import RequestError
from emendo.low_rank import LowRank
from emendo.models._forward import label_logits, model_inputs
from emendo.models.lm import LM
from emendo.models.text import Text, collate

M = TypeVar("M", nn.Module, LM)


@contextmanager
def applied_to_rows(model: M, sets: Sequence[Sequence[Edit]]) -> Iterator[M]:
    """Run a model with row ``i`` of every batch under the edits ``sets[i]``; an empty set leaves its row alone.

    Every batch is read as it comes, in its order: by ``generate`` and ``logits`` of what the block is given, and by a
    call of the model itself. Rows under the same set share their arithmetic, and what no edit touches is bit for bit
    what it was.

    Raises:
        MismatchError: an edit was made for another model.
        RequestError: a batch with another number of rows (raised where the model is called).
    """
    module = model.model if isinstance(model, LM) else model
    for edit in {id(edit): edit for edits in sets for edit in edits}.values():
        edit.check(model)
    changes: dict[str, list[tuple[list[int], LowRank]]] = {}
    for members in _alike(sets):
        for name, delta in compose(sets[members[0]]).deltas.items():
            changes.setdefault(name, []).append((members, delta))
    handles = []
    try:
        for name, parts in changes.items():
            hook = _RowAdder(len(sets), parts)
            handles.append(module.get_submodule(name).register_forward_hook(hook))
        yield _in_order(model)
    finally:
        for handle in handles:
            handle.remove()


def _alike(sets: Sequence[Sequence[Edit]]) -> Iterator[list[int]]:
    """The rows of each set of edits that is not empty."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, edits in enumerate(sets):
        groups.setdefault(tuple(id(edit) for edit in edits), []).append(row)
    yield from (members for edits, members in groups.items() if edits)


def _in_order(model: M) -> M:
    if isinstance(model, LM):
        return cast("M", _InOrder(model.model, model.tokenizer, model.name, model.chat))
    return model


@dataclass(frozen=True, eq=False)
class _InOrder(LM):
    """Reads all texts as one batch in their order, where the model else sorts them by length."""

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        batch = collate(texts)
        inputs = model_inputs(self.model, batch, positions=self.kind == "causal")
        rows = label_logits(self.model, inputs, batch.positions)
        return list(rows.split([len(text.labels) for text in texts]))


class _RowAdder:
    """The forward hook of one matrix: some rows get a change, others another or none."""

    def __init__(self, count: int, parts: Sequence[tuple[list[int], LowRank]]) -> None:
        self.count = count
        self.parts = [(torch.tensor(rows), delta) for rows, delta in parts]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.dim() == 2 and len(x) % self.count == 0:  # some blocks (OPT's) flatten their tokens
            x = x.view(self.count, -1, x.shape[-1])
        if len(x) != self.count:
            raise RequestError(
                f"Edits were given for {self.count} rows, but the model was called with a batch of {len(x)}."
            )
        out = output.clone().view(*x.shape[:-1], output.shape[-1])
        for rows, delta in self.parts:
            at, change = rows.to(x.device), delta.to(x.device)
            out[at] += change(x[at])
        return out.view(output.shape)
