"""Edits one after the other against a copy of the model whose weights are changed step by step."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import build_lm, records, unchanged
from emendo.data import Record
from emendo.data.abilities import Choice
from emendo.editors import Editor
from emendo.editors.cache import Cache, CacheConfig
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate.damage import Damage
from emendo.evaluate.metrics import answer_match, first_line, same_answer
from emendo.evaluate.results import Result
from emendo.evaluate.run_folder import RunFolder
from emendo.evaluate.sequential import evaluate_sequence
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import to_texts
from evaluate.reference import forced


def some(n: int) -> list[Record]:
    return [dataclasses.replace(r, paraphrases=r.paraphrases[:1], unrelated=()) for r in records(n)]


def editor_for(lm: LM, name: str) -> Editor:
    sites = find_sites(lm.model, last=1)
    torch.manual_seed(0)
    if name == "ft":
        return FineTuning(sites, FineTuningConfig(lr=0.01, steps=2))
    return Mend(sites, MendConfig(rank=4, alpha=0.3, norm=False)).eval()


@pytest.mark.parametrize(("kind", "name"), [("llama", "mend"), ("gpt2", "mend"), ("llama", "ft")])
def test_each_edit_is_made_in_the_model_that_the_earlier_ones_left(kind: str, name: str) -> None:
    lm = build_lm(kind)
    editor, chosen = editor_for(lm, name), some(4)
    with unchanged(lm.model):
        found = evaluate_sequence(lm, editor, chosen, at=(1, 3))
    assert [point.edits for point in found.checkpoints] == [1, 3, 4]
    twin = LM(copy.deepcopy(lm.model), lm.tokenizer)  # its weights are changed in earnest
    for count, record in enumerate(chosen, 1):
        change_in_earnest(twin, editor, record)
        alone = found.right_after[count - 1]
        assert {outcome.kind for outcome in alone.outcomes} == {"edit", "paraphrase"}
        check(lm, twin, alone)
        for point in found.checkpoints:
            if point.edits == count:
                assert [result.record for result in point.results] == chosen[:count]
                for result in point.results:
                    check(lm, twin, result)
                last = point.results[-1]
                for site in editor.sites:
                    norm = site.weight(twin.model) - site.weight(lm.model)
                    share = float(norm.norm() / site.weight(lm.model).norm())
                    assert last.norms[site.name] == pytest.approx(share, rel=1e-3)


def change_in_earnest(twin: LM, editor: Editor, record: Record) -> None:
    for site, change in editor.each(twin, [Request(record.prompt, record.target)]).items():
        weight = twin.model.get_submodule(site).weight
        dense = change[0].dense().detach()
        with torch.no_grad():
            weight += dense if weight.shape == dense.shape else dense.T


def check(lm: LM, twin: LM, result: Result) -> None:
    for outcome in result.outcomes:
        logits, labels = forced(lm, twin.model, outcome.prompt, outcome.answer)
        before, _ = forced(lm, lm.model, outcome.prompt, outcome.answer)
        wanted = before.argmax(-1).tolist() if outcome.local else labels
        assert outcome.teacher_forced == (logits.argmax(-1).tolist() == wanted)
        nll = -logits.log_softmax(-1)[range(len(labels)), labels].mean()
        assert outcome.nll_after == pytest.approx(float(nll), rel=5e-3, abs=1e-4)


def test_an_editor_that_changes_no_weights_holds_all_facts_so_far(tiny_llama: LM) -> None:
    found = evaluate_sequence(tiny_llama, Cache((), CacheConfig(radius=3)), some(3), at=(2,))
    for point in found.checkpoints:
        assert all(result.outcomes[0].teacher_forced for result in point.results)


class Forgetful(Cache):
    """Holds the last fact only."""

    def edit(self, lm: LM, prompt: Any, target: str | None = None) -> Any:
        return super().edit(lm, prompt[-1:])


def test_a_method_may_place_every_edit_and_lose_it_with_the_next(tiny_llama: LM) -> None:
    found = evaluate_sequence(
        tiny_llama, Forgetful((), CacheConfig(radius=0.1)), some(4), at=(1, 2)
    ).as_dict()
    success = [
        tuple(point[when]["teacher_forced"]["edit_success"]["mean"] for when in ("right_after", "retained"))
        for point in found["checkpoints"]
    ]
    assert success == [(1, 1), (1, 0.5), (1, 0.25)]


class Killed(Exception):
    pass


def test_a_killed_sequence_goes_on_and_gives_the_same_figures(tiny_llama: LM, tmp_path: Path) -> None:
    editor, chosen = editor_for(tiny_llama, "mend"), some(5)
    whole = evaluate_sequence(tiny_llama, editor, chosen, at=(2, 4))
    run = RunFolder.begin(tmp_path / "run", chosen, {})
    write = run.write

    def dying(number: int, results: Sequence[Result]) -> None:
        if number == 3:
            raise Killed
        write(number, results)

    run.write = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        evaluate_sequence(tiny_llama, editor, run.records, at=(2, 4), parts=run)
    again = RunFolder.begin(tmp_path / "run", chosen, {})
    assert again.begun == 3
    found = evaluate_sequence(tiny_llama, editor, again.records, at=(2, 4), parts=again)
    assert timeless(found.as_dict()) == timeless(whole.as_dict())


def timeless(found: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in found.items() if key != "seconds_per_edit"}


def test_damage_is_seen_at_every_checkpoint(tiny_llama: LM) -> None:
    damage = Damage(("The river is long and old.",), (Choice("grammar", "It", ("is", "are"), 0),))
    plain = evaluate_sequence(
        tiny_llama, editor_for(tiny_llama, "mend"), some(3), at=(1,), damage=damage
    ).as_dict()
    json.dumps(plain, allow_nan=False)
    seen = [point["damage"]["perplexity"] for point in plain["checkpoints"]]
    assert len(set(seen) | {plain["clean"]["perplexity"]}) == 3


class Remembers(FineTuning):
    """Fine-tuning that notes what it is told to continue from, and what the model says then."""

    def __init__(self, sites: tuple[Site, ...], config: FineTuningConfig) -> None:
        super().__init__(sites, config)
        self.told: list[list[Request]] = []
        self.seen: list[torch.Tensor] = []

    def start_over(self) -> None:
        self.told, self.seen = [], []

    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        self.told.append(list(requests))
        self.seen.append(lm.logits(to_texts(lm, [requests[0].pair]))[0])


def test_edits_of_several_facts_build_upon_one_another(tiny_llama: LM) -> None:
    sites, chosen = find_sites(tiny_llama.model, last=1), some(5)
    editor = Remembers(sites, FineTuningConfig(lr=0.01, steps=2))
    editor.told.append([])
    found = evaluate_sequence(tiny_llama, editor, chosen, at=(4,), together=2)
    assert [point.edits for point in found.checkpoints] == [4, 5]
    assert "each of 2 facts" in found.protocol["edits"]
    groups = [chosen[:2], chosen[2:4], chosen[4:]]
    assert editor.told == [[Request(r.prompt, r.target) for r in group] for group in groups]
    twin = LM(copy.deepcopy(tiny_llama.model), tiny_llama.tokenizer)  # its weights are changed in earnest
    for group, seen in zip(groups, editor.seen, strict=True):
        facts = [Request(r.prompt, r.target) for r in group]
        with torch.no_grad():
            for site, change in editor.together(twin, facts).items():
                twin.model.get_submodule(site).weight += change.dense()
        torch.testing.assert_close(
            seen, twin.logits(to_texts(twin, [facts[0].pair]))[0], rtol=1e-3, atol=1e-4
        )
    for result in (*found.right_after[4:], *found.checkpoints[-1].results):
        check(tiny_llama, twin, result)


def test_senseless_sequences_are_refused(tiny_llama: LM) -> None:
    editor = editor_for(tiny_llama, "mend")
    with pytest.raises(RequestError, match="no records"):
        evaluate_sequence(tiny_llama, editor, [])
    with pytest.raises(RequestError, match="at="):
        evaluate_sequence(tiny_llama, editor, some(1), at=(0,))
    with pytest.raises(RequestError, match="together=0"):
        evaluate_sequence(tiny_llama, editor, some(1), together=0)
    with pytest.raises(RequestError, match="guard watches single edits"):
        evaluate_sequence(tiny_llama, editor, some(2), together=2, gate=lambda request, change: True)


def test_what_the_gate_refuses_is_taken_off_and_asked_for_all_the_same(tiny_llama: LM) -> None:
    editor, chosen = editor_for(tiny_llama, "mend"), some(3)
    met: list[str] = []

    def gate(request: Request, change: Any) -> bool:
        met.append(request.target)
        assert {delta.batched for delta in change.values()} == {False}
        return request.prompt != chosen[1].prompt

    found = evaluate_sequence(tiny_llama, editor, chosen, at=(2,), gate=gate)
    assert met == [record.target for record in chosen]
    assert [point["refused"] for point in found.as_dict()["checkpoints"]] == [1, 1]
    without = evaluate_sequence(tiny_llama, editor, [chosen[0], chosen[2]])
    for kept, expected in ((0, 0), (2, 1)):
        again = found.checkpoints[-1].results[kept].outcomes
        plain = without.checkpoints[-1].results[expected].outcomes
        assert [o.nll_after for o in again] == pytest.approx([o.nll_after for o in plain], rel=1e-4)
    with pytest.raises(RequestError, match="changes no weights"):
        evaluate_sequence(tiny_llama, Cache((), CacheConfig()), chosen, gate=gate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "mend"), pytest.param("gpt2", "ft", marks=pytest.mark.slow)]
)
def test_free_generation_is_that_of_the_model_that_took_all_the_edits(kind: str, name: str) -> None:
    lm = build_lm(kind)
    editor, chosen = editor_for(lm, name), some(4)
    found = evaluate_sequence(lm, editor, chosen, at=(2,))
    twin = LM(copy.deepcopy(lm.model), lm.tokenizer)
    for count, record in enumerate(chosen, 1):
        change_in_earnest(twin, editor, record)
        for point in found.checkpoints:
            for outcome in (o for r in point.results if point.edits == count for o in r.outcomes):
                assert outcome.text_after is not None
                size = len(lm.tokenizer(outcome.text_after, add_special_tokens=False)["input_ids"])
                said = twin.generate(outcome.prompt, max(8, size))
                assert first_line(said).startswith(first_line(outcome.text_after))
                if outcome.local:
                    assert outcome.text_before is not None and outcome.exact is None
                    same = same_answer(outcome.text_before, said, outcome.answer)
                    assert outcome.generated == same
                else:
                    assert outcome.generated == answer_match(said, outcome.answer)
    assert all(o.generated is None and o.text_after is None for r in found.right_after for o in r.outcomes)


def test_what_is_retained_is_told_by_protocol(tiny_llama: LM) -> None:
    editor, chosen = Cache((), CacheConfig(radius=3)), some(3)
    spoken = evaluate_sequence(tiny_llama, editor, chosen, at=(2,))
    silent = evaluate_sequence(tiny_llama, editor, chosen, at=(2,), generated=False)
    groups = [point["retained"].keys() for point in spoken.as_dict()["checkpoints"]]
    assert all("free_generation" in names for names in groups)
    assert all("free_generation" not in p["retained"] for p in silent.as_dict()["checkpoints"])
    assert spoken.protocol["retained_generated"] and not silent.protocol["retained_generated"]
    assert spoken.after(2).results == spoken.checkpoints[0].results
    assert spoken.after().results == spoken.checkpoints[-1].results
    with pytest.raises(RequestError, match="after 2, 3 edits, not after 1"):
        spoken.after(1)
