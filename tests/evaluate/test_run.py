"""Batched evaluation against one record, one prompt and one token at a time, with dense weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from statistics import fmean

import pytest
import torch
from torch import Tensor

from cases import Recorded, build_lm, records
from emendo.data import Probe, Record
from emendo.data.schema import Consequence
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.errors import MismatchError, RequestError
from emendo.evaluate import Evaluation, Outcome, evaluate
from emendo.evaluate.metrics import answer_match, full_match, same_answer
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import encode
from emendo.models.trunk import Trunk
from evaluate.reference import edited, forced, greedy


def mend(lm: LM, alpha: float) -> Mend:
    torch.manual_seed(0)
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=4, norm=False)).eval()
    editor.alpha.data.fill_(alpha)  # NaN is no setting, but what a broken training leaves
    return editor


def mixed(n: int) -> list[Record]:
    """Records of which some lack paraphrases, some neighbours, some unrelated prompts."""
    made = records(n)
    made[1] = dataclasses.replace(made[1], paraphrases=(), unrelated=())
    made[2] = dataclasses.replace(made[2], neighbours=(), unrelated=())
    follows = Consequence("one_hop", f"The river of the capital of {made[0].subject} is", "the Tiber")
    made[0] = dataclasses.replace(made[0], consequences=(follows, dataclasses.replace(follows, kind="alias")))
    made[3] = dataclasses.replace(made[3], target="Old Town by the long and winding river")
    return made


@pytest.mark.parametrize(
    ("kind", "alpha", "bos"), [("gpt2", 0.1, True), pytest.param("llama", 0.3, False, marks=pytest.mark.slow)]
)
def test_equals_separate_edits_of_the_dense_weights(kind: str, alpha: float, bos: bool) -> None:
    lm = build_lm(kind, bos=bos)
    editor, chosen = mend(lm, alpha), mixed(4)
    found = evaluate(lm, editor, chosen, batch=3, new_tokens=5)
    assert [result.record for result in found.results] == chosen
    verdicts = set()
    for result in found.results:
        deltas = {
            n: d.sum()
            for n, d in editor.each(lm, [Request(result.record.prompt, result.record.target)]).items()
        }
        model = edited(lm, deltas)
        for outcome in result.outcomes:
            before, labels = forced(lm, lm.model, outcome.prompt, outcome.answer)
            after, _ = forced(lm, model, outcome.prompt, outcome.answer)
            local = outcome.kind in ("neighbour", "unrelated", "told")
            wanted = before.argmax(-1).tolist() if local else labels
            right = [a == b for a, b in zip(after.argmax(-1).tolist(), wanted, strict=True)]
            assert outcome.teacher_forced == all(right)
            assert outcome.token_level == pytest.approx(fmean(right))
            assert outcome.known == (before.argmax(-1).tolist() == labels)
            for logits, probability in ((before, outcome.before), (after, outcome.after)):
                logs = logits.log_softmax(-1)
                exact = math.exp(sum(float(row[label]) for row, label in zip(logs, labels, strict=True)))
                assert probability == pytest.approx(exact, rel=1e-3, abs=1e-8)
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            assert outcome.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-5)
            check_answer(outcome, "", before, after, labels)
            if outcome.other is None:
                assert outcome.other_nll_after is None
            else:
                sides = [forced(lm, m, outcome.prompt, outcome.other) for m in (lm.model, model)]
                check_answer(outcome, "other_", sides[0][0], sides[1][0], sides[0][1])
            if outcome.kind == "told":
                assert outcome.prompt.startswith(f"{result.record.prompt} {result.record.target}. ")
                assert outcome.text_after is outcome.generated is None
                continue
            slow = greedy(lm, model, outcome.prompt, 5)
            assert outcome.text_after == slow
            clean = greedy(lm, lm.model, outcome.prompt, 5)
            assert outcome.text_before == (None if outcome.kind == "paraphrase" else clean)
            same = same_answer(clean, slow, outcome.answer) if local else answer_match(slow, outcome.answer)
            assert outcome.generated == same
            assert outcome.exact == (None if local else full_match(slow, outcome.answer))
            verdicts.add((local, outcome.teacher_forced))
        norms = [
            float(delta.dense().norm() / site.weight(lm.model).norm())
            for site, delta in zip(editor.sites, deltas.values(), strict=True)
        ]
        assert result.norm == pytest.approx(fmean(norms), rel=1e-4)
        assert result.rank == max(delta.rank for delta in deltas.values())
    assert len(verdicts) == 4  # both kinds of prompts, right and wrong


def check_answer(outcome: Outcome, name: str, before: Tensor, after: Tensor, labels: list[int]) -> None:
    """What is said of one answer, token by token."""
    for side, logits in (("before", before), ("after", after)):
        logs = [row.double().log_softmax(-1) for row in logits]
        own = [float(row[label]) for row, label in zip(logs, labels, strict=True)]
        ranks = [1 + sum(float(v) > p for v in row) for row, p in zip(logs, own, strict=True)]
        assert getattr(outcome, f"{name}nll_{side}") == pytest.approx(-fmean(own), rel=1e-3, abs=1e-5)
        assert getattr(outcome, f"{name}{side}") == pytest.approx(math.exp(sum(own)), rel=2e-3, abs=1e-8)
        assert getattr(outcome, f"{name}rank_{side}") == pytest.approx(max(ranks), abs=1)  # but for ties
        if not name:
            hits = [float(row.argmax() == label) for row, label in zip(logs, labels, strict=True)]
            assert getattr(outcome, f"share_{side}") == pytest.approx(fmean(hits))


@pytest.mark.slow
def test_the_batch_size_changes_nothing(tiny_llama: LM) -> None:
    editor, chosen = mend(tiny_llama, 0.3), mixed(4)
    one, many = (evaluate(tiny_llama, editor, chosen, batch=batch) for batch in (1, 4))
    for alone, together in zip(one.results, many.results, strict=True):
        assert [o.kind for o in alone.outcomes] == [o.kind for o in together.outcomes]
        for a, b in zip(alone.outcomes, together.outcomes, strict=True):
            assert (a.teacher_forced, a.generated, a.known) == (b.teacher_forced, b.generated, b.known)
            assert (a.text_before, a.text_after) == (b.text_before, b.text_after)
            assert a.after == pytest.approx(b.after, rel=1e-3, abs=1e-8)
    assert one.scores() == many.scores()


def test_scores_are_means_over_facts_of_means_over_prompts(tiny_llama: LM) -> None:
    found = evaluate(tiny_llama, mend(tiny_llama, 0.3), mixed(4))
    for measure in ("teacher_forced", "generated"):
        scores = found.scores(measure)
        for name, kinds in {
            "edit_success": {"edit"},
            "generalisation": {"paraphrase"},
            "locality": {"neighbour", "unrelated"},
            "locality_neighbours": {"neighbour"},
            "locality_unrelated": {"unrelated"},
        }.items():
            facts = []
            for result in found.results:
                values = [float(getattr(o, measure)) for o in result.outcomes if o.kind in kinds]
                facts += [fmean(values)] if values else []
            score = scores[name]
            assert score is not None
            assert score.mean == pytest.approx(fmean(facts))
            assert score.low <= score.mean <= score.high


def test_an_edit_of_nothing_is_local_and_useless(tiny_gpt2: LM) -> None:
    found = evaluate(tiny_gpt2, mend(tiny_gpt2, 0.0), records(5)).as_dict()
    for group in ("teacher_forced", "generated"):
        assert found[group]["locality"]["mean"] == 1
        assert found[group]["edit_success"]["mean"] == 0
        assert found[group]["generalisation"]["mean"] == 0
    assert found["locality_kl"] == pytest.approx(0, abs=1e-6)
    assert found["relative_norm"] == found["rank"] == 0


class Insistent(Mend):
    """Takes many plain gradient steps, each from where the last one led: sure of its fact, and of little else."""

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        texts = encode(lm.tokenizer, [(r.prompt, r.target) for r in requests])
        trunk = Trunk(lm.model, self.sites)
        total: dict[str, LowRank] = {}
        for _ in range(20):
            with applied(lm.model, total):
                factors = edit_factors(trunk, self.sites, texts)
            step = {name: f.lowrank(-0.3 * f.delta, f.u) for name, f in factors.items()}
            total = {name: total[name] + d if total else d for name, d in step.items()}
        return total


@pytest.mark.slow
def test_an_editor_that_insists_succeeds(tiny_llama: LM) -> None:
    editor = Insistent(find_sites(tiny_llama.model, last=2), MendConfig(rank=2)).eval()
    found = evaluate(tiny_llama, editor, records(4), batch=2).as_dict()
    assert found["teacher_forced"]["edit_success"]["mean"] == 1
    assert found["generated"]["edit_success"]["mean"] == 1
    assert found["teacher_forced"]["locality"]["mean"] < 1


def test_as_dict_is_the_json_of_the_command(tiny_llama: LM) -> None:
    found = evaluate(tiny_llama, mend(tiny_llama, 0.3), records(9), limit=3)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["records"] == 3
    assert plain["seconds_per_edit"] > 0
    assert plain["prompts"] == {"edit": 3, "paraphrase": 6, "neighbour": 6, "unrelated": 6, "told": 6}
    assert plain["protocol"]["fingerprint"] == tiny_llama.fingerprint
    for group in ("teacher_forced", "generated"):
        for name in ("edit_success", "generalisation", "locality"):
            assert set(plain[group][name]) == {"mean", "low", "high"}
    assert set(plain["locality_known"]) == {"mean", "low", "high", "n"}


def test_one_locality_prompt_and_no_generation(tiny_llama: LM) -> None:
    """The CounterFact layout; and what was not asked for is null, not zero."""
    chosen = [
        dataclasses.replace(r, paraphrases=r.paraphrases[:1], neighbours=r.neighbours[:1], unrelated=())
        for r in records(3)
    ]
    found = evaluate(tiny_llama, mend(tiny_llama, 0.3), chosen, generated=False)
    plain = found.as_dict()
    assert plain["generated"] is None
    assert set(plain["teacher_forced"]) == {"edit_success", "generalisation", "locality"}
    kinds = ["edit", "paraphrase", "neighbour", "told"]
    assert all([o.kind for o in result.outcomes] == kinds for result in found.results)
    assert all(o.generated is None and o.text_after is None for r in found.results for o in r.outcomes)


def test_a_record_with_nothing_but_its_edit(tiny_llama: LM) -> None:
    bare = [dataclasses.replace(r, paraphrases=(), neighbours=(), unrelated=()) for r in records(2)]
    plain = evaluate(tiny_llama, mend(tiny_llama, 0.3), bare).as_dict()
    nothing = {"mean": None, "low": None, "high": None}
    assert plain["teacher_forced"]["generalisation"] == plain["generated"]["locality"] == nothing
    assert plain["locality_known"] == {**nothing, "n": 0}
    assert plain["locality_kl"] is None


def test_known_locality_counts_only_what_the_clean_model_says(tiny_llama: LM) -> None:
    said = tiny_llama.generate("The capital of Nowhere is", 1)
    assert said.strip()
    [record] = records(1)
    record = dataclasses.replace(
        record,
        neighbours=(Probe("The capital of Nowhere is", said), Probe("Two and two are", "four")),
        unrelated=(),
    )
    found = evaluate(tiny_llama, mend(tiny_llama, 0.0), [record])
    interval, count = found.locality_known()
    known = [o.known for o in found.results[0].outcomes if o.kind == "neighbour"]
    assert count == sum(known)
    assert (interval.mean if interval else None) == (1.0 if count else None)


def test_generation_stays_within_the_context(tiny_gpt2: LM) -> None:
    """Learned positions end at the context; a prompt near it is continued as far as it goes."""
    [record] = records(1)
    prompt = record.prompt
    while (
        len(tiny_gpt2.tokenizer("x " + prompt + " " + record.target)["input_ids"]) <= 96
    ):  # the tiny models' context
        prompt = "x " + prompt
    found = evaluate(tiny_gpt2, mend(tiny_gpt2, 1.0), [dataclasses.replace(record, prompt=prompt)])
    assert "told" not in {o.kind for o in found.results[0].outcomes}  # no room for both


def test_the_editor_keeps_its_mode_and_progress_is_told(tiny_llama: LM) -> None:
    editor, progress = mend(tiny_llama, 1.0).train(), Recorded()
    evaluate(tiny_llama, editor, records(3), batch=2, progress=progress)
    assert editor.training
    assert progress.updates == [("edits", 2, 3), ("edits", 3, 3)]


@pytest.mark.parametrize("setting", [{"limit": 0}, {"batch": 0}, {"new_tokens": 0}])
def test_senseless_numbers_are_refused(tiny_llama: LM, setting: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(setting))):
        evaluate(tiny_llama, mend(tiny_llama, 1.0), records(1), **setting)


def test_no_records_are_refused(tiny_llama: LM) -> None:
    with pytest.raises(RequestError, match="no records"):
        evaluate(tiny_llama, mend(tiny_llama, 1.0), [])


def test_an_editor_of_another_model_is_refused(tiny_llama: LM) -> None:
    editor = mend(tiny_llama, 1.0)
    editor.fingerprint = "0" * 16
    with pytest.raises(MismatchError, match="0000"):
        evaluate(tiny_llama, editor, records(1))


def test_a_broken_edit_scores_nothing_and_is_still_json(tiny_llama: LM) -> None:
    found = evaluate(tiny_llama, mend(tiny_llama, float("nan")), records(2), new_tokens=2).as_dict()
    json.dumps(found, allow_nan=False)
    assert found["teacher_forced"]["edit_success"]["mean"] == 0
    assert found["locality_kl"] is None


def test_an_evaluation_is_frozen() -> None:
    assert Evaluation.__dataclass_params__.frozen  # type: ignore[attr-defined]
