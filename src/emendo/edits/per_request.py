"""Edits per request: each row of a batch under its own set of edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from emendo.edits.edit import Edit, compose
from emendo.low_rank import LowRank, RowGroups, applied
from emendo.models._forward import label_logits, model_inputs
from emendo.models.lm import LM
from emendo.models.text import Text, collate

M = TypeVar("M", nn.Module, LM)


@contextmanager
def applied_to_rows(model: M, sets: Sequence[Sequence[Edit]]) -> Iterator[M]:
    """Run a model with row ``i`` of every batch under the edits ``sets[i]``; an empty set leaves its row unedited.

    Every batch keeps its order, in ``generate`` and ``logits`` of the model that the block receives and in calls of the
    model itself. Rows with the same set share their arithmetic. An unedited row gives the same bits as without edits.

    Args:
        model: the model.
        sets: the edits of each row.

    Raises:
        MismatchError: an edit was made for another model.
        RequestError: a batch has another number of rows (raised where the model is called).
    """
    for edit in {id(edit): edit for edits in sets for edit in edits}.values():
        edit.check(model)
    groups: dict[str, list[tuple[list[int], LowRank]]] = {}
    for rows in _rows_by_set(sets):
        for name, delta in compose(sets[rows[0]]).deltas.items():
            groups.setdefault(name, []).append((rows, delta))
    changes = {name: RowGroups(len(sets), own) for name, own in groups.items()}
    with applied(model.model if isinstance(model, LM) else model, changes):
        yield _in_order(model)


def _rows_by_set(sets: Sequence[Sequence[Edit]]) -> list[list[int]]:
    """The rows of each distinct, non-empty set of edits."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, edits in enumerate(sets):
        groups.setdefault(tuple(id(edit) for edit in edits), []).append(row)
    return [rows for edits, rows in groups.items() if edits]


def _in_order(model: M) -> M:
    if isinstance(model, LM):
        return cast("M", _InOrder(model.model, model.tokenizer, model.name, model.chat))
    return model


@dataclass(frozen=True, eq=False)
class _InOrder(LM):
    """Runs all texts as one batch in their order, where ``LM`` sorts them by length."""

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        batch = collate(texts)
        inputs = model_inputs(self.model, batch, positions=self.kind == "causal")
        rows = label_logits(self.model, inputs, batch.positions)
        return list(rows.split([len(text.labels) for text in texts]))
