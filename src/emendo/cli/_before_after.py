"""Making one edit and looking at what it does: what `emendo edit` and `emendo demo` share."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from emendo.cli._tables import rows_as_dicts
from emendo.editors import Editor
from emendo.edits.edit import BaseEdit, Edit, Request
from emendo.evaluate import Question, Row, before_after
from emendo.models.lm import LM

UNRELATED = (
    "Water is made of hydrogen and",
    "The chemical symbol of oxygen is",
    "The author of Romeo and Juliet is William",
)
"""Prompts that no usual edit should touch."""


def make_edit(
    lm: LM, editor: Editor, request: Request, asked: Sequence[Question]
) -> tuple[BaseEdit, list[Row]]:
    """An edit with its figures in its card, and what the model answers before and after.

    Where no weights change, the edit's rank and norm are 0.

    Raises:
        RequestError: a text that does not fit the model.
        MismatchError: the editor was trained for another model.
    """
    edit = editor.edit(lm, [request])
    rows = before_after(lm, edit, asked, host=editor.host(lm))
    rank, norms = 0, [0.0]
    if isinstance(edit, Edit):
        rank, norms = edit.rank, list(edit.relative_norms(editor.host(lm)).values())
    card = {
        "target_before": rows[0].target_before,
        "target_after": rows[0].target_after,
        "reached": rows[0].reached,
        "rank": rank,
        "relative_norm": fmean(norms),
        "rows": rows_as_dicts(rows),
    }
    return edit.with_card(card), rows
