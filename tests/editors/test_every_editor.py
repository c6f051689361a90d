"""One suite for every editor, on a decoder, an encoder-decoder and a classifier; its cases are rows in `cases.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import ARCHITECTURES, CONTEXT, EDITOR_CASES, build_lm, records_for, unchanged
from emendo.data import Record
from emendo.editors import EDITORS, Editor, GradientEditor, editor_class, read_edit
from emendo.editors._locality import LocalityEditor
from emendo.edits.edit import BaseEdit, Edit, Request
from emendo.errors import MismatchError, RequestError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.train import TrainConfig, train

KINDS = {"llama": {"num_hidden_layers": 3}, "t5-gated": {"num_layers": 2}, "bert": {"num_hidden_layers": 3}}
ALL = [(name, kind) for name in EDITORS for kind in KINDS]
REFUSED = [(name, kind) for name, kind in ALL if ARCHITECTURES[kind].kind in EDITOR_CASES[name].refuses]
CELLS = [cell for cell in ALL if cell not in REFUSED]
ALIKE = (
    "meta-curvature",
    "meta-sgd",
    "malmen",
    "ft-kl",
    "ft-constrained",
    "ft-penalised",
    "diff-pruning",
    "ewc",
    "crisp",
    "joint-rome",
    "alphaedit",
    "ultraedit",
    "repair",
)
"""Methods that edit as another one does: the default suite makes and undoes their edit of a decoder, no more."""
FAST = TrainConfig(steps=2, batch=1, lr=1e-3, warmup=0)


@dataclass(frozen=True, slots=True)
class Ready:
    """An editor that can edit a model, some facts, and its edit of the first of them."""

    lm: LM
    editor: Editor
    facts: list[Request]
    edit: BaseEdit

    @property
    def host(self) -> LM:
        """The model that its edits are for."""
        return self.editor.host(self.lm)


def model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> LM:
    lm = build_lm(kind, dtype, seed=seed, **KINDS[kind])
    lm.tokenizer.model_max_length = CONTEXT  # T5 itself reads texts of any length
    return lm


def make(name: str, lm: LM, seed: int = 0) -> Editor:
    """An editor made with a seed; what needs training gets two steps of it."""
    torch.manual_seed(seed)
    kind = editor_class(name)
    case = EDITOR_CASES[name]
    sites = find_sites(lm.model, last=1 if lm.kind == "seq2seq" else 2)
    editor = kind(kind.default_sites(lm.model) if case.own_sites else sites, kind.Config(**case.config))
    made = records_for(lm, 8)
    if isinstance(editor, LocalityEditor):
        editor.set_locality([probe for record in made[4:] for probe in record.neighbours])
    if isinstance(editor, GradientEditor):
        train(lm, editor, made[4:], [], FAST)
    return editor.eval()


def prepare(name: str, lm: LM) -> Ready:
    facts = [Request(r.prompt, new_answer(lm, r)) for r in records_for(lm, 3)]
    with unchanged(lm.model):
        editor = make(name, lm)
        return Ready(lm, editor, facts, editor.edit(lm, facts[0].prompt, facts[0].target))


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    return {kind: model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def editors(models: dict[str, LM]) -> Callable[[str, str], Ready]:
    """Each editor is made once for each model, where it is first asked for."""
    return cache(lambda name, kind: prepare(name, models[kind]))


@pytest.fixture(
    params=[
        pytest.param(
            cell,
            id="-".join(cell),
            marks=[pytest.mark.slow] if cell[0] in ALIKE and cell[1] != "llama" else [],
        )
        for cell in CELLS
    ]
)
def ready(request: pytest.FixtureRequest, editors: Callable[[str, str], Ready]) -> Ready:
    return editors(*request.param)


@pytest.fixture(
    params=[
        pytest.param(
            cell,
            id="-".join(cell),
            marks=[] if cell[1] == "llama" and cell[0] not in ALIKE else [pytest.mark.slow],
        )
        for cell in CELLS
    ]
)
def sample(request: pytest.FixtureRequest, editors: Callable[[str, str], Ready]) -> Ready:
    """For what does not depend on the kind of model: the other kinds are in the slow suite, as are methods alike."""
    return editors(*request.param)


def answers(lm: LM, facts: list[Request]) -> Tensor:
    """The logits of all targets, one after the other, `[labels, vocabulary]`."""
    return torch.cat(lm.logits(to_texts(lm, [(fact.prompt, fact.target) for fact in facts])))


def edited(ready: Ready, edit: BaseEdit, facts: list[Request]) -> Tensor:
    with edit.applied(ready.host) as lm:
        return answers(lm, facts)


def nll(lm: LM, logits: Tensor, facts: list[Request]) -> float:
    labels = [label for text in to_texts(lm, [(f.prompt, f.target) for f in facts]) for label in text.labels]
    return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels)))


def others(lm: LM, prompt: str) -> list[str]:
    """The classes that a classifier does not answer by itself."""
    return [name for name in lm.labels if name != lm.generate(prompt)]


def new_answer(lm: LM, record: Record) -> str:
    """What the model does not say already: fine-tuning would have nothing to do."""
    return others(lm, record.prompt)[0] if lm.kind == "classifier" else record.target


def targets(lm: LM, prompt: str) -> list[str]:
    """A target of one token and one of many; a classifier's are all one class."""
    return others(lm, prompt) if lm.kind == "classifier" else ["is", "New Port, the Old Town by the sea"]


def test_every_method_has_its_row() -> None:
    assert list(EDITOR_CASES) == list(EDITORS)


def test_it_makes_an_edit_that_says_where_it_comes_from(ready: Ready) -> None:
    edit, origin, editor = ready.edit, ready.edit.origin, ready.editor
    assert type(edit) is editor.makes
    assert (origin.editor, origin.model) == (editor.name, ready.lm.name)
    assert origin.fingerprint == ready.host.fingerprint
    assert origin.settings == asdict(editor.config)
    assert origin.requests == (ready.facts[0],)
    assert datetime.fromisoformat(origin.date).tzinfo is not None
    if not editor.no_changes:
        assert isinstance(edit, Edit)
        assert list(edit.deltas) == [site.name for site in editor.sites]
        assert all(d.left.isfinite().all() and d.right.isfinite().all() for d in edit.deltas.values())


def test_it_changes_the_answer_and_is_undone_bit_for_bit(ready: Ready) -> None:
    fact = ready.facts[:1]
    before = answers(ready.host, fact)
    with unchanged(ready.lm.model), unchanged(ready.host.model):
        after = edited(ready, ready.edit, fact)
        with pytest.raises(ZeroDivisionError), ready.edit.applied(ready.host):
            raise ZeroDivisionError
        assert torch.equal(answers(ready.host, fact), before)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    if EDITOR_CASES[ready.editor.name].teaches:
        assert nll(ready.lm, after, fact) < nll(ready.lm, before, fact)


def test_several_facts_make_one_edit(sample: Ready) -> None:
    before = answers(sample.host, sample.facts)
    with unchanged(sample.lm.model):
        edit = sample.editor.edit(sample.lm, sample.facts)
        after = edited(sample, edit, sample.facts)
    assert edit.origin.requests == tuple(sample.facts)
    assert after.isfinite().all()
    size = 1e-3 * before.abs().max()
    assert all((a - b).abs().max() > size for a, b in zip(after, before, strict=True))
    pairs = [(fact.prompt, fact.target) for fact in sample.facts]
    assert torch.equal(edited(sample, sample.editor.edit(sample.lm, pairs), sample.facts), after)


def test_separate_edits_in_one_batch_are_those_made_alone(sample: Ready) -> None:
    if sample.editor.no_changes:
        with pytest.raises(RequestError, match="changes no weights"):
            sample.editor.each(sample.lm, sample.facts)
        return
    with unchanged(sample.lm.model):
        each = sample.editor.each(sample.lm, sample.facts)
    assert list(each) == [site.name for site in sample.editor.sites]
    for i, fact in enumerate(sample.facts):
        alone = sample.editor.edit(sample.lm, fact.prompt, fact.target)
        assert isinstance(alone, Edit)
        for name, delta in each.items():
            expected = alone.deltas[name].dense()
            assert (delta[i].dense() - expected).norm() <= 5e-2 * expected.norm(), f"{name}, fact {i}"


def test_a_target_of_one_token_and_one_of_many(sample: Ready) -> None:
    lm, prompt = sample.lm, sample.facts[0].prompt
    short, long = to_texts(lm, [(prompt, target) for target in targets(lm, prompt)])
    assert len(short.labels) == (1 if lm.kind != "seq2seq" else 2)  # with its end token
    assert len(long.labels) > 8 or lm.kind == "classifier"
    for target in targets(lm, prompt):
        fact = [Request(prompt, target)]
        with unchanged(lm.model):
            after = edited(sample, sample.editor.edit(lm, prompt, target), fact)
        assert after.isfinite().all()
        assert not torch.allclose(after, answers(sample.host, fact))


def test_what_it_cannot_edit_is_said(ready: Ready) -> None:
    long, target = "word " * CONTEXT, ready.facts[0].target
    with unchanged(ready.lm.model):
        for prompt in (long, [(long, target)], [ready.facts[0], (long, target)]):
            with pytest.raises(RequestError, match=f"context is {CONTEXT}"):
                ready.editor.edit(ready.lm, prompt, target)
        with pytest.raises(RequestError, match="prompt is empty"):
            ready.editor.edit(ready.lm, " ", target)
        with pytest.raises(RequestError, match="target is empty"):
            ready.editor.edit(ready.lm, ready.facts[0].prompt, "")
        with pytest.raises(RequestError, match="nothing to edit"):
            ready.editor.edit(ready.lm, [])


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_kind_of_model_it_cannot_edit_is_said(name: str, kind: str, models: dict[str, LM]) -> None:
    lm = models[kind]
    (record,) = records_for(lm, 1)
    with unchanged(lm.model), pytest.raises(RequestError) as error:
        make(name, lm).edit(lm, record.prompt, record.target)
    assert EDITOR_CASES[name].refuses[lm.kind] in str(error.value)


@pytest.mark.parametrize("name", [name for name, kind in CELLS if kind == "bert"])
def test_a_classifier_is_asked_for_its_classes(name: str, editors: Callable[[str, str], Ready]) -> None:
    ready = editors(name, "bert")
    with pytest.raises(RequestError, match="'Paris' is not a class of tiny-bert"):
        ready.editor.edit(ready.lm, ready.facts[0].prompt, "Paris")


def test_the_same_seed_gives_the_same_edit(sample: Ready) -> None:
    """Bit for bit: asked again, whatever was drawn meanwhile, and made anew."""
    first = edited(sample, sample.edit, sample.facts)
    torch.rand(3)
    fact = sample.facts[0]
    assert torch.equal(
        edited(sample, sample.editor.edit(sample.lm, fact.prompt, fact.target), sample.facts), first
    )
    again = prepare(sample.editor.name, sample.lm)
    assert torch.equal(edited(again, again.edit, sample.facts), first)


def test_saved_and_loaded_it_answers_the_same(sample: Ready, tmp_path: Path) -> None:
    expected = edited(sample, sample.edit, sample.facts)
    sample.edit.save_pretrained(tmp_path / "edit")
    edit = read_edit(tmp_path / "edit")
    assert type(edit) is type(sample.edit)
    assert edit.origin == sample.edit.origin
    assert torch.equal(edited(sample, edit, sample.facts), expected)
    sample.editor.save_pretrained(tmp_path / "editor")
    editor = Editor.from_pretrained(tmp_path / "editor")
    assert type(editor) is type(sample.editor)
    assert (editor.config, editor.sites) == (sample.editor.config, sample.editor.sites)
    edit = editor.edit(sample.lm, sample.facts[0].prompt, sample.facts[0].target)
    assert torch.equal(edited(replace(sample, editor=editor), edit, sample.facts), expected)


def test_another_model_is_refused(sample: Ready) -> None:
    other = model(sample.lm.name.removeprefix("tiny-"), seed=1)
    with unchanged(other.model):
        with pytest.raises(MismatchError), sample.edit.applied(other):
            pytest.fail("an edit was applied to another model")
        if sample.editor.needs_training:
            with pytest.raises(MismatchError, match="was trained for"):
                sample.editor.edit(other, sample.facts[0].prompt, sample.facts[0].target)


def test_a_model_in_half_precision(sample: Ready) -> None:
    """Whatever was trained in float32 edits the same model in bfloat16, and stays in float32 itself."""
    half = LM(copy.deepcopy(sample.lm.model).bfloat16(), sample.lm.tokenizer, sample.lm.name)
    low, fact = replace(sample, lm=half), sample.facts[0]
    with unchanged(half.model):
        edit = sample.editor.edit(half, fact.prompt, fact.target)
        before, after = answers(low.host, [fact]), edited(low, edit, [fact])
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    if isinstance(edit, Edit):
        assert all(delta.left.dtype == torch.float32 for delta in edit.deltas.values())
