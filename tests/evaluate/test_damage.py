"""Perplexity, abilities and continuations against plain passes; the questions themselves."""

from __future__ import annotations

import dataclasses
import math
from statistics import fmean

import pytest
import torch

from cases import build_lm, records
from emendo.data import Record
from emendo.data.abilities import OPENINGS, PASSAGES, Choice, abilities, grammar
from emendo.data.atlas import read_atlas, render
from emendo.editors import Editor
from emendo.editors.cache import Cache, CacheConfig
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate import evaluate
from emendo.evaluate.damage import Damage
from emendo.evaluate.metrics import ngram_entropy, repetition
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from evaluate.reference import edited, forced

ITEMS = (
    Choice("grammar", "The river", ("is long", "are"), 0),
    Choice("grammar", "The rivers", ("is", "are"), 1),
    Choice("arithmetic", "2 + 2 =", ("5", "4", "3"), 1),
)
TEXTS = ("The old town by the long river.", "A")


def mend(lm: LM, alpha: float = 0.3) -> Mend:
    torch.manual_seed(0)
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=4, norm=False)).eval()
    editor.alpha.data.fill_(alpha)  # NaN is no setting, but what a broken training leaves
    return editor


def damage(**more: object) -> Damage:
    fields = {
        "passages": TEXTS,
        "items": ITEMS,
        "openings": ("The town", "A river"),
        "edits": 2,
        "long_tokens": 12,
    }
    return Damage(**{**fields, **more})  # type: ignore[arg-type]


def slow(lm: LM, model: object) -> dict[str, float]:
    """One text at a time."""
    nll, tokens = 0.0, 0
    for text in TEXTS:
        ids = lm.tokenizer(text)["input_ids"]
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[operator]
        nll -= sum(float(logs[i, token]) for i, token in enumerate(ids[1:]))
        tokens += len(ids) - 1
    right: dict[str, list[bool]] = {}
    for item in ITEMS:
        scores = []
        for option in item.options:
            logits, labels = forced(lm, model, item.prompt, option)
            scores.append(float(logits.log_softmax(-1)[range(len(labels)), labels].mean()))
        right.setdefault(item.family, []).append(scores.index(max(scores)) == item.right)
    share = {f"ability_{family}": fmean(values) for family, values in right.items()}
    return {"perplexity": math.exp(nll / tokens), **share, "ability": fmean(share.values())}


def test_damage_equals_plain_passes() -> None:
    lm = build_lm("llama")
    editor, chosen = mend(lm), records(4)
    found = evaluate(lm, editor, chosen, generated=False, batch=2, damage=damage())
    assert {k: v for k, v in found.clean.items() if k in slow(lm, lm.model)} == pytest.approx(
        slow(lm, lm.model), rel=1e-3
    )
    looked = []
    for result in found.results:
        edit = editor.edit(lm, result.record.prompt, result.record.target)
        expected = slow(lm, edited(lm, edit.deltas))  # type: ignore[attr-defined]
        assert result.damage["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
        if "ability" in result.damage:
            looked.append(result.edit)
            with edit.applied(lm):
                texts = lm.generate(["The town", "A river"], 12)
            expected |= {
                "entropy": fmean(map(ngram_entropy, texts)),
                "repetition": fmean(map(repetition, texts)),
            }
            assert result.damage == pytest.approx(expected, rel=1e-3)
    assert looked == [0, 3]  # evenly spaced, the first and the last among them
    plain = found.as_dict()["damage"]
    values = [result.damage["perplexity"] for result in found.results]
    assert plain["perplexity"]["mean"] == pytest.approx(fmean(values))
    assert (plain["perplexity"]["max"], plain["perplexity"]["edits"]) == (max(values), 4)
    assert plain["perplexity"]["median"] == sum(sorted(values)[1:3]) / 2
    assert plain["ability"]["edits"] == 2


def test_several_facts_in_one_edit_are_asked_under_that_edit() -> None:
    lm = build_lm("llama")
    editor, chosen = mend(lm), records(5)
    found = evaluate(lm, editor, chosen, generated=False, together=2, damage=damage(items=(), openings=()))
    assert [result.edit for result in found.results] == [0, 0, 1, 1]  # the fifth fills no group
    for result in found.results:
        group = chosen[result.edit * 2 : result.edit * 2 + 2]
        model = edited(lm, editor.together(lm, requests(group)))
        for outcome in result.outcomes:
            logits, labels = forced(lm, model, outcome.prompt, outcome.answer)
            nll = -logits.log_softmax(-1)[range(len(labels)), labels].mean()
            assert outcome.nll_after == pytest.approx(float(nll), rel=5e-3, abs=1e-4)
    assert found.as_dict()["damage"]["perplexity"]["edits"] == 2
    with pytest.raises(RequestError, match="fewer records"):
        evaluate(lm, editor, chosen, together=6)


def requests(group: list[Record]) -> list[Request]:
    return [Request(r.prompt, r.target) for r in group]


@pytest.mark.parametrize("editor", [Cache((), CacheConfig(radius=0))], ids=["cache"])
def test_an_edit_that_is_elsewhere_does_no_damage(tiny_llama: LM, editor: Editor) -> None:
    found = evaluate(tiny_llama, editor, records(2), generated=False, damage=damage())
    for result in found.results:
        assert result.damage == pytest.approx(dict(found.clean), rel=1e-4)


def test_a_broken_edit_answers_nothing_right(tiny_llama: LM) -> None:
    broken = evaluate(tiny_llama, mend(tiny_llama, math.nan), records(1), generated=False, damage=damage())
    assert broken.results[0].damage["ability"] == 0
    assert not math.isfinite(broken.results[0].damage["perplexity"])
    assert broken.as_dict()["damage"]["perplexity"]["mean"] is None


def test_only_decoders_continue_texts() -> None:
    lm = build_lm("t5")
    with pytest.raises(RequestError, match="leave damage out"):
        evaluate(lm, mend(lm), records(1), damage=damage())


def test_questions_are_the_same_everywhere_and_none_is_of_what_is_edited() -> None:
    edits = [dataclasses.replace(r, relation="country_capital", subject="Japan") for r in records(1)]
    asked = abilities(edits)
    assert asked == abilities(edits)
    families = {
        family: [c for c in asked if c.family == family] for family in ("knowledge", "grammar", "arithmetic")
    }
    assert [len(items) for items in families.values()] == [40, 40, 40]
    for item in asked:
        assert len(set(item.options)) == len(item.options) in (2, 4)
        assert 0 <= item.right < len(item.options)
    known = read_atlas()
    forbidden = {
        render(known.prompts[f.relation][0], f.subject)
        for f in known.facts
        if f.relation == "country_capital"
    }
    for item in families["knowledge"]:
        assert item.prompt not in forbidden and "Japan" not in item.prompt
    for item in families["arithmetic"]:
        assert eval(item.prompt.removesuffix(" =")) == int(item.options[item.right])
    places = [item.right for item in asked]
    assert max(places.count(place) for place in range(4)) < len(asked) * 0.6


def test_grammar_by_hand() -> None:
    right = {item.prompt: item.options[item.right] for item in grammar(1000)}
    assert right["The key near the tables"] == "is"
    assert right["The children that the woman has seen"] == "were"
    assert right["We looked at these"] != right["We looked at a single"]


def test_texts_are_plain() -> None:
    assert len(PASSAGES) >= 4 and all(len(text.split()) > 50 for text in PASSAGES)
    assert all(text.isascii() and text == " ".join(text.split()) for text in (*PASSAGES, *OPENINGS))
