"""A model with its ledger: the working model is its base and the active edits, and the guard stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import build_lm, unchanged
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.editors.in_context import InContext
from emendo.edits.edit import Edit, Origin, Request, compose
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.ledger import Ledger, NewEntry, Operation, _composition, workspace
from emendo.ledger.guard import Guard
from emendo.ledger.health import Limits, RefusedError
from emendo.ledger.place import create_ledger
from emendo.ledger.probes import Probes
from emendo.ledger.workspace import Workspace
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites

LOOSE = Limits(0, 0, *[1e9] * 7)
PROBES = Probes(
    (("A river in", ""), ("The capital of Gude is", "New Town")), "Bread is made from flour. " * 3
)
PROMPT = "The capital of Bada is"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMENDO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def work(tiny_llama: LM) -> Workspace:
    return Workspace.open(tiny_llama, limits=LOOSE, probes=PROBES, recheck_every=0)


def random_edit(lm: LM, seed: int, prompt: str = PROMPT, size: float = 0.1) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        site.name: LowRank(
            size * torch.randn(site.d_out, 2, generator=generator),
            torch.randn(2, site.d_in, generator=generator),
        )
        for site in find_sites(lm.model)
    }
    origin = Origin(lm.fingerprint, lm.name, "mend", {"seed": seed}, (Request(prompt, "Oslo"),), "2025-01-31")
    return Edit(deltas, origin)


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    ids = lm.tokenizer(PROMPT, return_tensors="pt").input_ids
    found: Tensor = lm.model(ids).logits
    return found


def under(lm: LM, edits: Sequence[Edit]) -> Tensor:
    if not edits:
        return logits(lm)
    with compose(edits).applied(lm):
        return logits(lm)


def now(work: Workspace) -> Tensor:
    with work.applied() as lm:
        return logits(lm)


def test_the_working_model_is_its_base_and_the_active_edits(work: Workspace) -> None:
    lm, edits = work.lm, [random_edit(work.lm, seed) for seed in range(4)]
    with unchanged(lm.model):
        assert torch.equal(now(work), logits(lm))
        for count, edit in enumerate(edits, 1):
            work.apply(edit)
            assert torch.equal(now(work), under(lm, edits[:count]))
        work.revert(2)
        assert torch.equal(now(work), under(lm, [edits[0], edits[2], edits[3]]))  # exact, not by subtraction
        work.undo(2)
        assert torch.equal(now(work), under(lm, edits[:1]))
        work.undo()
        assert torch.equal(now(work), logits(lm))
        with work.applied(3) as edited:  # an earlier state, to look at
            found = logits(edited)
        assert torch.equal(found, under(lm, edits[:3]))
        assert work.composed() is None
        kept = work.composed(4)
        assert kept is not None and kept.rank == 8


def test_a_new_process_finds_the_same_model(work: Workspace) -> None:
    work.apply(random_edit(work.lm, 1))
    again = Workspace.open(build_lm("llama"), create=False)
    assert torch.equal(now(again), now(work))
    assert again.edit(1).digest == work.edit(1).digest == work.ledger.entry(1).digest


def test_the_guard_refuses_and_nothing_happens(tiny_llama: LM) -> None:
    work = Workspace.open(tiny_llama, probes=PROBES)
    before = now(work)
    with pytest.raises(RefusedError) as refused:
        work.apply(random_edit(tiny_llama, 1, size=2.0))
    assert refused.value.health.norm > Limits().norm
    assert any("of its size" in problem for problem in refused.value.problems)
    assert "Nothing was applied" in str(refused.value)
    assert work.ledger.head.kind == "begin"
    assert torch.equal(now(work), before)


def test_forced_it_is_on_record(tiny_llama: LM) -> None:
    work = Workspace.open(tiny_llama, probes=PROBES)
    done = work.apply(random_edit(tiny_llama, 1, size=2.0), force=True, note="because")
    assert done.forced and done.note == "because"
    assert done.health is not None
    assert done.health["problems"] and done.health["limits"]["norm"] == Limits().norm
    assert not work_loose(tiny_llama).apply(random_edit(tiny_llama, 2), force=True).forced  # nothing to force


def work_loose(lm: LM) -> Workspace:
    return Workspace.open(lm, limits=LOOSE, probes=PROBES)


def test_what_the_guard_measures_is_on_top_of_what_is_there(work: Workspace) -> None:
    first, second = random_edit(work.lm, 1), random_edit(work.lm, 2, prompt="The capital of Cobo is")
    alone = work.check(second)
    assert alone.kl == alone.total_kl  # from the clean model
    work.apply(first)
    health = work.check(second)
    assert health.kl != alone.kl and health.total_kl != health.kl
    assert health.norm == alone.norm
    both = work.check(random_edit(work.lm, 2, prompt="A river in"))
    assert both.kl != health.kl  # a watched prompt that is edited does not count


def test_an_edit_that_works_passes_and_is_made_upon_the_others(tiny_llama: LM) -> None:
    work = Workspace.open(
        tiny_llama,
        limits=Limits(
            norm=9, changed=1, kl=9, perplexity=9, total_kl=99, total_perplexity=99, total_changed=1
        ),
        probes=PROBES,
    )
    editor = FineTuning(find_sites(tiny_llama.model), FineTuningConfig(lr=3e-2))
    first = work.make(editor, [Request(PROMPT, "Oslo")])
    assert first.origin.upon == ()
    done = work.apply(first)
    assert done.health is not None and done.health["reached"] == 1.0
    second = work.make(editor, [Request("The capital of Gude is", "Rome")])
    assert second.origin.upon == (first.digest,)
    clean = editor.edit(tiny_llama, [Request("The capital of Gude is", "Rome")])
    assert clean.digest != second.digest  # the others were there
    work.apply(second)
    assert [entry.id for entry in work.ledger.later_upon(1)] == [2]
    step, found = work.revert(1)
    assert step.active == (2,)
    assert [outcome.entry.id for outcome in found.outcomes] == [2]
    check = work.ledger.checks()[-1]
    assert check.operation == step.id and check.figures["retention"] == found.retention


def test_examined(work: Workspace) -> None:
    lm = work.lm
    editor = FineTuning(find_sites(lm.model), FineTuningConfig(lr=3e-2))
    edit = work.make(editor, [Request(PROMPT, "Oslo")])
    asked = (*edit.origin.requests, Request("A river in", "Rome"))
    work.apply(replace(edit, origin=replace(edit.origin, requests=asked)))
    found = work.examine()
    assert found.outcomes[0].reached == (True, False)
    assert found.retention == 0.5 and not found.outcomes[0].holds
    assert found.as_dict()["lost"] == [1]
    assert found.drift.kl > 0 and work.ledger.checks() == []
    work.undo()
    clean = work.examine()
    assert clean.retention == 1.0
    assert (clean.drift.changed, clean.drift.kl, clean.drift.perplexity) == (0, 0, 1)


def test_the_whole_stack_is_measured_again_and_again(tiny_llama: LM) -> None:
    work = Workspace.open(tiny_llama, limits=LOOSE, probes=PROBES, recheck_every=2)
    for seed in range(5):
        work.apply(random_edit(tiny_llama, seed))
    assert [check.operation for check in work.ledger.checks()] == [2, 4]
    assert [check.figures["edits"] for check in work.ledger.checks()] == [2, 4]


def test_an_edit_checked_on_a_state_that_is_gone_is_checked_again(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, seen = Workspace.open(work.lm, limits=LOOSE, probes=PROBES), []
    plain = Guard.health

    def slow(self: Guard, state: Operation, *rest: object) -> object:
        seen.append(state.active)
        if len(seen) == 1:  # another process is faster
            other.ledger.apply(random_edit(work.lm, 9).to_bytes(), _about())
        return plain(self, state, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Guard, "health", slow)
    done = work.apply(random_edit(work.lm, 1))
    assert seen == [(), (1,)]
    assert done.active == (1, 2)


def test_a_slow_check_is_never_refused(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take a step during every check, until it runs while they wait."""
    other, plain, seen = Ledger.open(Path(work.ledger.where).parent), Guard.health, []

    def slow(self: Guard, state: Operation, *rest: object) -> object:
        seen.append(state.id)
        if len(seen) < 4:
            other.apply(random_edit(work.lm, 90 + len(seen)).to_bytes(), _about())
        return plain(self, state, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Guard, "health", slow)
    assert work.apply(random_edit(work.lm, 1)).id == 4
    assert seen == [0, 1, 2, 3]


def test_long_stacks_are_composed_in_blocks(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_composition, "_BLOCK", 4)
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
    edits = [random_edit(work.lm, seed, size=0.02) for seed in range(11)]
    for edit in edits:
        work.ledger.apply(edit.to_bytes(), _about())
    found = now(work)
    torch.testing.assert_close(found, under(work.lm, edits), rtol=1e-4, atol=1e-5)
    whole = work.composed()
    assert whole is not None
    for name, delta in compose(edits).deltas.items():
        torch.testing.assert_close(whole.deltas[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)

    def again() -> Tensor:
        return now(Workspace(work.lm, work.ledger))

    loads, load = [], Ledger.load_many
    monkeypatch.setattr(Ledger, "load_many", lambda self, ids: loads.extend(ids) or load(self, ids))
    assert torch.equal(again(), found) and loads == [9, 10, 11]  # the whole blocks were kept
    for _ in range(2):  # by whatever way a state is reached, its weights are the same in every bit
        work.undo(4)
        seven = again()
        work.ledger.checkout(11)
        work.ledger.revert(5)
        work.ledger.checkout(7)
        assert torch.equal(again(), seven)
        for file in (tmp_path / "cache" / "composed").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:-1])  # damaged: composed anew
        assert torch.equal(again(), seven)
        work.ledger.checkout(11)
        assert torch.equal(again(), found)
    assert len([*(tmp_path / "cache" / "composed").rglob("*")]) <= 1 + _composition._FILES


def test_the_provenance_of_an_edit_does_not_grow_with_the_stack(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_LISTED", 2)
    editor = FineTuning(find_sites(work.lm.model), FineTuningConfig(lr=1e-3))
    for n in range(4):
        work.apply(work.make(editor, [Request(f"{PROMPT} {n}", "Oslo")]))
    entries = work.ledger.entries()
    assert [len(entry.upon) for entry in entries] == [0, 1, 2, 1]
    assert work.ledger.made_upon(entries[3]) == [1, 2, 3]
    assert [entry.id for entry in work.ledger.later_upon(1)] == [2, 3, 4]
    assert [entry.id for entry in work.ledger.later_upon(3)] == [4]


def test_when_all_edits_are_measured_again(work: Workspace) -> None:
    work.recheck_every = 10
    due = [count for count in range(1, 1201) if work._is_due(count)]
    assert due == [*range(10, 100, 10), *range(100, 1000, 100), 1000]


def test_a_fact_edited_twice_is_found(work: Workspace) -> None:
    work.apply(random_edit(work.lm, 1))
    work.apply(random_edit(work.lm, 2, prompt="A river in"))
    again = random_edit(work.lm, 3, prompt=f"  {PROMPT.upper()}\n")
    assert [entry.id for entry in work.same_prompts(again)] == [1]
    work.undo(2)
    assert work.same_prompts(again) == ()


def _about() -> NewEntry:
    return NewEntry("mend", "0", (), "2025-01-31")


def test_what_a_ledger_does_not_take(work: Workspace, tiny_gpt2: LM) -> None:
    with pytest.raises(MismatchError):
        work.apply(random_edit(tiny_gpt2, 1))
    words = InContext((), InContext.Config()).edit(work.lm, PROMPT, "Oslo")
    with pytest.raises(RequestError, match="changes of weights"):
        work.apply(words)
    with pytest.raises(RequestError, match="changes of weights"):
        work.make(InContext((), InContext.Config()), [Request(PROMPT, "Oslo")])
    many = Origin(work.lm.fingerprint, "m", "mend", {}, (Request("a", "b"), Request("c", "d")), "2025-01-31")
    with pytest.raises(RequestError, match="one request"):
        work.check(Edit(random_edit(work.lm, 1).deltas, many), paraphrases=["e"])
    work.apply(random_edit(work.lm, 1))
    with pytest.raises(RequestError, match="active already"):
        work.apply(random_edit(work.lm, 1))


def test_opening(tiny_llama: LM, tiny_gpt2: LM, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no ledger yet"):
        Workspace.open(tiny_llama, create=False)
    first = Workspace.open(tiny_llama, tmp_path / "elsewhere")
    assert Workspace.open(tiny_llama).ledger.id == first.ledger.id  # it is pointed to
    with pytest.raises(StorageError, match="one ledger"):
        Workspace.open(tiny_llama, tmp_path / "second")
    create_ledger("tiny-gpt2", "another fingerprint")
    with pytest.raises(MismatchError):
        Workspace.open(tiny_gpt2)
