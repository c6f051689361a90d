"""Making one edit and measuring its effect, for `emendo edit` and `emendo demo`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from emendo._storage import finite
from emendo.cli._tables import rows_as_dicts
from emendo.editors import Editor
from emendo.edits import BaseEdit, Request
from emendo.evaluate import Question, Row, before_after
from emendo.models.lm import LM

UNRELATED = (
    "Water is made of hydrogen and",
    "The chemical symbol of oxygen is",
    "The author of Romeo and Juliet is William",
)
"""Prompts whose answers no usual edit should change."""


def make_edit(
    lm: LM, editor: Editor, request: Request, questions: Sequence[Question]
) -> tuple[BaseEdit, list[Row]]:
    """An edit with its figures in its card, and the model's answers before and after it.

    Where no weights change, the edit's rank and norm are 0.

    Raises:
        RequestError: a text does not fit the model, or the edit holds NaN or infinite numbers.
        MismatchError: the editor was trained for another model.
    """
    edit = editor.edit(lm, [request])
    edit.check_numbers()
    host = editor.host(lm)
    rows = before_after(lm, edit, questions, host=host)
    card = {
        "target_before": rows[0].target_before,
        "target_after": rows[0].target_after,
        "reached": rows[0].reached,
        "rank": edit.rank,
        "relative_norm": finite(fmean(edit.relative_norms(host).values() or [0.0])),
        "rows": rows_as_dicts(rows),
    }
    return edit.with_card(card), rows
