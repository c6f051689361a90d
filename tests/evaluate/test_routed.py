"""All edits in one memory, against separate edits and against the clean model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cases import records
from emendo.data import Probe
from emendo.editors.in_context import InContext
from emendo.errors import RequestError
from emendo.evaluate import evaluate
from emendo.evaluate.routed import evaluate_routed
from emendo.memory import Router
from emendo.memory.router import Judge
from emendo.memory.words import EVIDENCE
from emendo.models.lm import LM
from evaluate.test_run import mend


def by_subject(threshold: float = 0.5) -> Router:
    """A router that fires where the subject stands in the prompt, and by nothing else."""
    w1 = np.zeros((1, len(EVIDENCE)), np.float32)
    w1[0, EVIDENCE.index("subject")] = 20
    parts = (w1, np.array([-10.0], np.float32), np.array([20.0], np.float32), np.zeros(1, np.float32))
    return Router(Judge(*parts, np.array([threshold], np.float32)))


def test_prompts_in_scope_are_answered_as_by_separate_edits_and_all_others_as_by_the_clean_model(
    tiny_llama: LM,
) -> None:
    chosen = records(7)
    editor = mend(tiny_llama, 0.3)
    routed = evaluate_routed(
        tiny_llama, editor, chosen, batch=3, router=by_subject(), false_fires=1.0, subjects=True
    )
    alone = evaluate(tiny_llama, editor, chosen, batch=3, fact_in_context=False)
    for found, want in zip(routed.results, alone.results, strict=True):
        for now, then in zip(found.outcomes, want.outcomes, strict=True):
            if now.kind in ("edit", "paraphrase"):
                assert (now.teacher_forced, now.generated) == (then.teacher_forced, then.generated)
                assert now.after == pytest.approx(then.after, rel=1e-4)
            else:
                assert (now.kl, now.after, now.text_after) == (0, now.before, now.text_before)
    assert (routed.routing["right"], routed.routing["wrong"], routed.routing["none"]) == (1, 0, 0)
    assert set(routed.routing["false_fires"].values()) == {0}
    assert routed.scores()["locality"].mean == 1


def test_a_router_that_always_fires_is_found_out(tiny_llama: LM) -> None:
    chosen = records(5)
    always = by_subject()
    always.judge.b2[:] = 40
    found = evaluate_routed(
        tiny_llama, mend(tiny_llama, 0.3), chosen, generated=False, router=always, false_fires=1.0
    )
    assert found.routing["none"] == 0
    assert found.routing["false_fires"]["neighbour"] == 1


def test_the_prompt_of_another_edit_is_no_false_fire(tiny_llama: LM) -> None:
    chosen = records(4)
    chosen[0] = replace(chosen[0], neighbours=(Probe(chosen[1].prompt, "it"),), unrelated=())
    found = evaluate_routed(
        tiny_llama,
        mend(tiny_llama, 0.3),
        chosen,
        generated=False,
        router=by_subject(),
        false_fires=1.0,
        subjects=True,
    )
    probes = sum(len(record.neighbours) for record in chosen)
    assert found.routing["out_of_scope"]["neighbour"] == probes - 1
    assert found.routing["false_fires"]["neighbour"] == 0


def test_only_changes_of_weights_can_be_routed(tiny_llama: LM) -> None:
    with pytest.raises(RequestError, match="Only edits of weights"):
        evaluate_routed(tiny_llama, InContext(()), records(2))
