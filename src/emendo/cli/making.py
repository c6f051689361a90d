"""Making one edit and looking at what it does: what `emendo edit` and `emendo demo` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from emendo.cli.show import rows_as_dicts
from emendo.edit import Edit, Request
from emendo.editors import Editor
from emendo.evaluate import Question, Row, before_after
from emendo.models import LM

UNRELATED = (
    "Water is made of hydrogen and",
    "The chemical symbol of oxygen is",
    "The author of Romeo and Juliet is William",
)
"""Prompts that no usual edit should touch."""


def make_edit(lm: LM, editor: Editor, request: Request, asked: Sequence[Question]) -> tuple[Edit, list[Row]]:
    """An edit with its figures in its card, and what the model answers before and after.

    Raises:
        RequestError: a text that does not fit the model.
        MismatchError: the editor was trained for another model.
    """
    edit = editor.edit(lm, [request])
    rows = before_after(lm, edit, asked)
    card = {
        "target_before": rows[0].target_before,
        "target_after": rows[0].target_after,
        "reached": rows[0].reached,
        "rank": edit.rank,
        "relative_norm": fmean(edit.relative_norms(lm).values()),
        "rows": rows_as_dicts(rows),
    }
    return replace(edit, card=card), rows
