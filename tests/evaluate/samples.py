"""An evaluation, a before/after table and an edit without a model, for plots and reports."""

from __future__ import annotations

import torch

from cases import records
from emendo.edits.edit import Edit, Origin, Request
from emendo.evaluate import Answer, Evaluation, Outcome, Result, Row
from emendo.evaluate.results import Kind
from emendo.low_rank import LowRank


def outcome(kind: Kind, right: bool, generated: bool | None, **more: object) -> Outcome:
    fields = {
        "kind": kind,
        "prompt": f"a prompt ({kind})",
        "answer": "Paris",
        "teacher_forced": right,
        "token_level": float(right),
        "generated": generated,
        "known": True,
        "before": 1e-9,
        "after": 0.5,
        "kl": 0.25,
        "text_before": None if generated is None else " Rome, and\nmore",
        "text_after": None if generated is None else " Paris is",
        **more,
    }
    return Outcome(**fields)  # type: ignore[arg-type]


def evaluation(generated: bool = True, **more: object) -> Evaluation:
    """Two facts: the first all right, the second right nowhere but at one of two neighbours."""
    second = (
        ("edit", False),
        ("paraphrase", False),
        ("neighbour", True),
        ("neighbour", False),
        ("unrelated", False),
    )
    first = tuple((kind, True) for kind, _ in second)
    results = tuple(
        Result(
            record,
            tuple(outcome(kind, right, right if generated else None, **more) for kind, right in kinds),  # type: ignore[arg-type]
            rank=3,
            norm=0.01,
        )
        for record, kinds in zip(records(2), (first, second), strict=True)
    )
    return Evaluation(results, {"edits": "one at a time", "batch": 25}, 0.125, 0.025)


def rows(prompt: str = "The capital of Bade is", text: str = "Paris") -> list[Row]:
    kinds: tuple[Kind, ...] = ("edit", "paraphrase", "neighbour", "unrelated")
    answers = (Answer(text, 0.75), Answer("Rome", 0.0001))
    return [Row(kind, prompt, "Paris", "Rome", answers, answers, 0.001, 0.9, True, True) for kind in kinds]


def edit(prompt: str = "The capital of Bade is", target: str = "Paris") -> Edit:
    origin = Origin(
        "0" * 16, "tiny", "mend", {"rank": 4}, (Request(prompt, target),), "2025-01-01T00:00:00+00:00"
    )
    return Edit({"blocks.1.mlp": LowRank(torch.ones(4, 2), torch.ones(2, 3))}, origin)


def history() -> list[dict[str, float]]:
    row = {"loss": 2.0, "edit": 1.5, "KL": 0.0, "success": 0.5, "generalisation": 0.25, "locality": 1.0}
    held_out = {f"validation {name}": value for name, value in row.items()}
    return [{"step": 25, **row}, {"step": 50, **row}, {"step": 50, **held_out}]
