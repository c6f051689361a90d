"""Edits in the memory of a ledger: exact undo, one edit per prompt, and the guard in the scope of an edit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sqlalchemy import create_engine, text

from emendo.errors import RequestError
from emendo.ledger.health import read_figures
from emendo.ledger.probes import ProbeOutputs, ProbeRunner, Probes
from emendo.ledger.store import Ledger
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from emendo.models.tokenization import to_texts
from memory.test_bank import FACTS, OUT_OF_SCOPE, an_edit

LOOSE = {"force": True}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path / "home"))


@pytest.fixture
def work(tiny_llama: LM, tmp_path: Path) -> Workspace:
    found = Workspace.open(tiny_llama, tmp_path / "ledger", recheck_every=0)
    for seed, fact in enumerate(FACTS):
        found.apply(an_edit(tiny_llama, fact, seed=seed), scope={}, **LOOSE)
    return found


def answers(work: Workspace, state: int | str = "head") -> list[str]:
    with work.applied(state) as lm:
        found: list[str] = lm.generate([*(prompt for prompt, _ in FACTS), *OUT_OF_SCOPE], 5)
    return found


def test_each_prompt_has_its_edit_and_all_others_the_base_model(work: Workspace) -> None:
    found = answers(work)
    for seed, (prompt, target) in enumerate(FACTS):
        with an_edit(work.lm, (prompt, target), seed=seed).applied(work.lm):
            assert found[seed] == work.lm.generate(prompt, 5)
    assert found[3:] == work.lm.generate(OUT_OF_SCOPE, 5)
    assert work.composed() is None
    assert [choice.edit for choice in work.memory().route([prompt for prompt, _ in FACTS])] == [1, 2, 3]


def test_undo_revert_and_checkout_are_exact(work: Workspace, tmp_path: Path) -> None:
    before = answers(work)
    work.revert(2)
    without = answers(work)
    assert without[1] == work.lm.generate([*(prompt for prompt, _ in FACTS), *OUT_OF_SCOPE], 5)[1]
    assert [without[i] for i in (0, 2, 3, 4, 5)] == [before[i] for i in (0, 2, 3, 4, 5)]
    work.undo(2)
    assert answers(work) == work.lm.generate([*(prompt for prompt, _ in FACTS), *OUT_OF_SCOPE], 5)
    work.ledger.checkout(3)
    assert answers(work) == before
    again = Workspace.open(work.lm, tmp_path / "ledger")
    assert answers(again) == before
    assert answers(again, 1)[1:] == work.lm.generate([*(prompt for prompt, _ in FACTS), *OUT_OF_SCOPE], 5)[1:]


def test_edits_in_the_weights_and_in_the_memory_stand_side_by_side(tiny_llama: LM, tmp_path: Path) -> None:
    work = Workspace.open(tiny_llama, tmp_path / "ledger", recheck_every=0)
    everywhere, here = an_edit(tiny_llama, FACTS[0], seed=5), an_edit(tiny_llama, FACTS[1], seed=6)
    work.apply(everywhere, **LOOSE)
    work.apply(here, scope={}, **LOOSE)
    texts = to_texts(tiny_llama, [(FACTS[1][0], "it", None), (OUT_OF_SCOPE[0], "it", None)])
    with work.applied() as lm:
        found = lm.logits(texts)
    with everywhere.applied(tiny_llama):
        assert torch.allclose(found[1], tiny_llama.logits([texts[1]])[0], atol=1e-5)
        with here.applied(tiny_llama):
            assert torch.allclose(found[0], tiny_llama.logits([texts[0]])[0], atol=1e-5)
    made = work.upon(here, work.ledger.head)
    assert made.origin.upon == (everywhere.digest,)  # an edit is made upon those in the weights


def test_the_guard_judges_an_edit_in_its_scope(work: Workspace) -> None:
    step = work.ledger.head
    assert step.health is not None
    assert (step.health["changed"], step.health["kl"], step.health["perplexity"]) == (0, 0, 1)
    assert step.health["captured"] == []
    same = an_edit(work.lm, (FACTS[0][0], "Rome"), seed=7)
    taken = work.apply(same, scope={}, **LOOSE).health
    assert taken is not None
    assert taken["captured"] == [1]


def test_the_evidence_of_a_scope_is_used(tiny_llama: LM, tmp_path: Path) -> None:
    work = Workspace.open(tiny_llama, tmp_path / "ledger", recheck_every=0)
    asked = ["Where do the Fosobans' ministers sit?", "The capital of Old Fosland is"]
    work.apply(
        an_edit(tiny_llama, FACTS[0]), scope={"paraphrases": asked[:1], "aliases": ["Old Fosland"]}, **LOOSE
    )
    assert [choice.edit for choice in work.memory().route(asked)] == [1, 1]
    assert work.ledger.scopes() == {1: {"paraphrases": asked[:1], "aliases": ["Old Fosland"]}}


def test_an_edit_without_a_prompt_cannot_be_routed(tiny_llama: LM, tmp_path: Path) -> None:
    work = Workspace.open(tiny_llama, tmp_path / "ledger")
    with pytest.raises(RequestError, match="names no prompt"):
        work.apply(an_edit(tiny_llama), scope={}, **LOOSE)
    assert work.ledger.head.id == 0


def test_a_ledger_from_before_there_was_a_memory_is_converted(work: Workspace, tmp_path: Path) -> None:
    old = create_engine(f"sqlite:///{tmp_path / 'ledger' / 'ledger.sqlite'}")
    with old.begin() as connection:
        connection.execute(text("ALTER TABLE periods DROP COLUMN scope"))
        connection.execute(text("DELETE FROM migrations WHERE name LIKE '0003%'"))
    old.dispose()
    again = Ledger.open(tmp_path / "ledger")
    assert again.head.active == (1, 2, 3)
    assert again.scopes() == {}


def test_probes_are_run_again_only_where_another_edit_answers_and_the_figures_are_those_of_a_full_run(
    tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*((prompt, "it") for prompt, _ in FACTS), ("Bread is made of", "")]
    probes = Probes(tuple(prompts), "Bread is good. " * 3)

    def figures(where: str) -> list[dict[str, float]]:
        monkeypatch.setenv("EMENDO_HOME", str(tmp_path / f"home-{where}"))
        work = Workspace.open(tiny_llama, tmp_path / where, recheck_every=0, probes=probes)
        found = []
        for seed, fact in enumerate(FACTS):
            step = work.apply(an_edit(tiny_llama, fact, seed=seed), scope={}, **LOOSE)
            found.append(read_figures(step.health))
            if seed == 1:
                work.ledger.revert(1)
                work.apply(an_edit(tiny_llama, ("x", "y"), seed=9), **LOOSE)  # into the weights
        return found

    ran: list[int] = []
    real = ProbeRunner.rerun

    def watched(self: ProbeRunner, lm: LM, before: ProbeOutputs, places: list[int]) -> ProbeOutputs:
        ran.append(len(places))
        return real(self, lm, before, places)

    monkeypatch.setattr(ProbeRunner, "rerun", watched)
    quick = figures("quick")
    assert ran and max(ran) <= 2
    monkeypatch.setattr(ProbeRunner, "rerun", lambda self, lm, before, places: self.run(lm))
    for one, other in zip(quick, figures("full"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert quick[0]["changed"] < quick[2]["total_changed"]
