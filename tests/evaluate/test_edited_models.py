"""Edits that are asked together against one edit at a time, full passes, and a copy of the model with dense weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from cases import build_lm, plain_logits, records_for, unchanged
from emendo.data import Record
from emendo.editors import Editor, GradientEditor
from emendo.editors.cache import Cache, CacheConfig
from emendo.editors.in_context import InContext
from emendo.edits.edit import Request
from emendo.errors import MismatchError
from emendo.evaluate import edited_models as asking
from emendo.evaluate.edited_models import make_edits
from emendo.low_rank import LowRank
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from evaluate.reference import edited


class Step(GradientEditor):
    """One step of gradient descent, of low rank."""

    name = "step"
    Config = dict

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        return {name: f.lowrank(-0.3 * f.delta, f.u) for name, f in factors.items()}


class Dense(Step):
    """The same step as dense changes, and several facts at once as the mean of their changes."""

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        return {n: LowRank.from_dense(d.dense()) for n, d in super().each(lm, requests).items()}

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        return {n: LowRank.from_dense(d.dense().mean(0)) for n, d in super().each(lm, requests).items()}


class Taught(Step):
    """Its changes are those of another model, all of whose parameters differ, or those behind the trunk only."""

    behind = False

    def host(self, lm: LM) -> LM:
        if not hasattr(self, "_host"):
            model, trunk = copy.deepcopy(lm.model), Trunk(lm.model, self.sites)
            below = tuple(f"{trunk.stack}.{i}." for i in range(trunk.block))
            for name, parameter in model.named_parameters():
                behind = name.startswith(trunk.stack) and not name.startswith(below)
                if behind if self.behind else not name.endswith("bias"):
                    parameter.mul_(1.1)
            self._host = LM(model, lm.tokenizer, lm.name)
        return self._host  # type: ignore[no-any-return,has-type]

    def host_cache(self, lm: LM, store: TrunkCache) -> TrunkCache | None:
        return store.with_trunk(Trunk(self.host(lm).model, self.sites)) if self.behind else None


class TaughtBehind(Taught):
    behind = True


KINDS = ("llama", "t5", "bart", "bert")
WEIGHTS = [
    ("llama", Step, (3, 1)),
    ("t5", Step, (2, 1)),
    ("opt", Dense, (1, 1, 1)),  # flattens its tokens
    ("llama", Taught, (1, 1)),
    ("bart", TaughtBehind, (1, 1)),
    # what the others prove, for other kinds of model
    pytest.param("llama", Step, (1, 1), marks=pytest.mark.slow),
    *(pytest.param(kind, Step, (2, 1), marks=pytest.mark.slow) for kind in ("bart", "bert")),
    pytest.param("gpt2", Dense, (1, 1, 1), marks=pytest.mark.slow),
    pytest.param("t5", Dense, (2, 1), marks=pytest.mark.slow),
    pytest.param("t5", Taught, (2, 1), marks=pytest.mark.slow),
    pytest.param("bert", TaughtBehind, (1, 1), marks=pytest.mark.slow),
]


def wishes(lm: LM, sizes: Sequence[int]) -> tuple[list[list[Request]], list[Record]]:
    """Requests in groups of those sizes, and one record of each group."""
    facts = iter(records_for(lm, sum(sizes)))
    groups = [[next(facts) for _ in range(size)] for size in sizes]
    return [[Request(r.prompt, r.target) for r in group] for group in groups], [group[-1] for group in groups]


def questions(lm: LM, chosen: Sequence[Record]) -> tuple[list[int], list[Text], list[str]]:
    """Texts of every length, the edits they stand under going up and down."""
    pairs = [
        (row, prompt, answer)
        for row, record in enumerate(chosen)
        for prompt, answer in (
            (record.prompt, record.target),
            (record.paraphrases[1], record.target),
            (record.neighbours[0].prompt, record.neighbours[0].answer),
        )
    ][::-1]
    pairs += pairs[1:3]
    rows, prompts, _ = map(list, zip(*pairs, strict=True))
    return rows, to_texts(lm, [(prompt, answer) for _, prompt, answer in pairs]), prompts


def store_for(lm: LM, editor: Editor) -> TrunkCache:
    return TrunkCache(Trunk(lm.model, editor.sites or find_sites(lm.model)), dtype=torch.float32)


@pytest.mark.parametrize(("kind", "method", "sizes"), WEIGHTS)
def test_changes_of_weights(kind: str, method: type[Step], sizes: Sequence[int]) -> None:
    lm = build_lm(kind)
    editor = method(find_sites(lm.model), {}).eval()
    groups, chosen = wishes(lm, sizes)
    rows, texts, prompts = questions(lm, chosen)
    with unchanged(lm.model), unchanged(editor.host(lm).model):
        asked = make_edits(lm, editor, groups, store_for(lm, editor))
        logits, words = asked.logits(rows, texts), asked.generate(rows, prompts, 2)
    assert asked.seconds > 0
    assert asked.deltas is not None
    for site in editor.sites:
        together = [editor.together(lm, group)[site.name].dense() for group in groups]
        torch.testing.assert_close(
            asked.deltas[site.name].dense(), torch.stack(together), rtol=1e-3, atol=1e-5
        )
    for row, group in enumerate(groups):  # each from the clean model, in a copy with dense weights
        twin = LM(edited(editor.host(lm), editor.together(lm, group)), lm.tokenizer)
        mine = [i for i, other in enumerate(rows) if other == row]
        for i in mine:
            expected = plain_logits(twin.model, collate([texts[i]]))
            torch.testing.assert_close(logits[i], expected, rtol=2e-3, atol=2e-3)
            assert (logits[i] - lm.logits([texts[i]])[0]).abs().max() > 0.01
        assert [words[i] for i in mine] == twin.generate([prompts[i] for i in mine], 2)


@pytest.mark.parametrize("method", [Step, Dense])
def test_changes_of_weights_share_passes(method: type[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm("llama")
    editor = method(find_sites(lm.model, last=1), {}).eval()
    groups, chosen = wishes(lm, (1, 1, 1))
    rows, texts, _ = questions(lm, chosen)
    store = store_for(lm, editor)
    store.ensure(texts)
    passes: list[int] = []
    logits = store.trunk.logits
    monkeypatch.setattr(store.trunk, "logits", lambda b, h=None: passes.append(len(b)) or logits(b, h))
    asked = make_edits(lm, editor, groups, store)
    asked.logits(rows, texts)
    assert passes == [len(rows)]
    passes.clear()
    monkeypatch.setattr(asking, "FORCED_TOKENS", 24)  # batches of one or two
    asked.logits(rows, texts)
    assert len(passes) > 3 and sum(passes) == len(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "editor", [Cache((), CacheConfig(radius=3)), InContext(())], ids=["cache", "in-context"]
)
def test_other_edits(kind: str, editor: Editor) -> None:
    if kind == "bert" and isinstance(editor, InContext):
        return
    lm = build_lm(kind)
    groups, chosen = wishes(lm, (2, 1))
    rows, texts, prompts = questions(lm, chosen)
    with unchanged(lm.model):
        asked = make_edits(lm, editor, groups, store_for(lm, editor))
        logits, words = asked.logits(rows, texts), asked.generate(rows, prompts, 2)
    assert asked.deltas is None
    assert asked.seconds > 0
    for row, text, prompt, found, said in zip(rows, texts, prompts, logits, words, strict=True):
        with editor.edit(lm, groups[row]).applied(lm) as told:
            torch.testing.assert_close(found, told.logits([text])[0], rtol=1e-3, atol=1e-3)
            assert said == told.generate(prompt, 2)


def test_an_editor_may_differentiate_and_its_graph_goes(tiny_llama: LM) -> None:
    class Careless(Step):
        def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
            assert torch.is_grad_enabled()
            plain = super().each(lm, requests)
            return {n: LowRank(d.left.requires_grad_(), d.right) for n, d in plain.items()}

    editor = Careless(find_sites(tiny_llama.model), {})
    with torch.no_grad():
        asked = make_edits(tiny_llama, editor, [[Request("x", "y")]], store_for(tiny_llama, editor))
        text = to_texts(tiny_llama, [("x", "y")])
    (logits,) = asked.logits([0], text)
    assert not logits.requires_grad
    assert asked.deltas is not None
    assert not any(delta.left.requires_grad for delta in asked.deltas.values())


def test_an_editor_of_another_model_is_refused(tiny_llama: LM) -> None:
    for editor in (Step(find_sites(tiny_llama.model), {}, "0" * 16), Cache((), None, "0" * 16)):
        with pytest.raises(MismatchError, match="0000"):
            make_edits(tiny_llama, editor, [[Request("x", "y")]], store_for(tiny_llama, editor))


def test_changes_of_unlike_rank_stand_beside_each_other() -> None:
    changes: list[Any] = [LowRank(torch.randn(4, r), torch.randn(r, 3)) for r in (2, 0, 5)]
    stacked = LowRank.stack(changes)
    assert (stacked.rank, stacked.batched) == (5, True)
    for one, change in zip(stacked.dense(), changes, strict=True):
        torch.testing.assert_close(one, change.dense())
