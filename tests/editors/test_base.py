"""What every editor has: capture, batching, edits, saving. Seen on the plainest editor, one step of SGD."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import (
    ARCHITECTURES,
    CONTEXT,
    VOCABULARY,
    build_lm,
    of_kind,
    plain_logits,
    records,
    records_for,
    unchanged,
)
from emendo import editors
from emendo.editors import EDITORS, Editor, GradientEditor, editor_class
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend
from emendo.edits.edit import Request
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.low_rank import LowRank, applied
from emendo.models.capture import Factors, capture
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_nll
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk


@dataclass(frozen=True, slots=True)
class StepConfig:
    lr: float = 0.1


class Step(GradientEditor):
    """``dW = -lr * sum_i delta_i u_i^T``: one step of gradient descent."""

    name = "step"
    Config = StepConfig

    def __init__(
        self, sites: tuple[Site, ...], config: StepConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.seen = nn.Parameter(torch.arange(3.0))

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        return {name: f.lowrank(-self.config.lr * f.delta, f.u) for name, f in factors.items()}


FACTS = [Request(record.prompt, record.target) for record in records(5)]


def editor_for(lm: LM) -> Step:
    return Step(find_sites(lm.model), fingerprint=lm.fingerprint)


def nll(lm: LM, request: Request) -> Tensor:
    """The slow reference: one text through the whole model, by hand or by the model's own loss; no batch, no trunk."""
    ids = lm.tokenizer(request.prompt, return_tensors="pt").input_ids
    if lm.kind == "classifier":
        return lm.model(ids, labels=torch.tensor([lm.labels.index(request.target)])).loss
    if lm.kind == "seq2seq":
        target = lm.tokenizer(request.target, return_tensors="pt").input_ids
        start = torch.tensor([[lm.model.config.decoder_start_token_id]])
        labels = target.clone()
        if lm.model.generation_config.forced_bos_token_id is not None:
            labels[0, 0] = -100
        return lm.model(ids, decoder_input_ids=torch.cat([start, target[:, :-1]], 1), labels=labels).loss
    start, ids = (
        ids.shape[1],
        lm.tokenizer(f"{request.prompt} {request.target}", return_tensors="pt").input_ids,
    )
    logits: Tensor = lm.model(ids).logits[0, start - 1 : -1]
    return nn.functional.cross_entropy(logits, ids[0, start:])


# ------------------------------------------------------------------------------------------ one edit


@pytest.mark.parametrize(
    ("kind", "bos"), [(kind, False) for kind in ARCHITECTURES] + [(kind, True) for kind in of_kind("causal")]
)
def test_an_edit_is_a_function_of_the_dense_gradient(kind: str, bos: bool) -> None:
    lm = build_lm(kind, torch.float64, bos=bos)
    fact = Request((record := records_for(lm, 3)[2]).prompt, record.target)
    with unchanged(lm.model):
        edit = editor_for(lm).edit(lm, fact.prompt, fact.target)
    twin = LM(copy.deepcopy(lm.model), lm.tokenizer)
    sites = find_sites(twin.model)
    weights = [site.module(twin.model).weight.requires_grad_() for site in sites]
    gradients = torch.autograd.grad(nll(twin, fact), weights)
    for site, gradient in zip(sites, gradients, strict=True):
        dense = -0.1 * (gradient.T if site.transposed else gradient)
        # Llama's kin compute their norms in float32 whatever the model's dtype.
        torch.testing.assert_close(edit.deltas[site.name].dense(), dense, rtol=1e-5, atol=1e-7)


def test_an_edit_knows_where_it_came_from(tiny_llama: LM) -> None:
    edit = editor_for(tiny_llama).edit(tiny_llama, "The capital of Fosoba is ", "Oslo")
    assert edit.origin.fingerprint == tiny_llama.fingerprint
    assert edit.origin.model == "tiny-llama"
    assert edit.origin.editor == "step"
    assert edit.origin.settings == {"lr": 0.1}
    assert edit.origin.requests == (Request("The capital of Fosoba is ", "Oslo"),)
    assert datetime.fromisoformat(edit.origin.date).tzinfo is not None


def test_several_facts_at_once_are_the_sum_of_their_edits(tiny_gpt2: LM) -> None:
    editor = editor_for(tiny_gpt2)
    singles = [editor.edit(tiny_gpt2, fact.prompt, fact.target) for fact in FACTS[:3]]
    together = editor.edit(tiny_gpt2, [FACTS[0], (FACTS[1].prompt, FACTS[1].target), FACTS[2]])
    assert together.origin.requests == tuple(FACTS[:3])
    for name, delta in together.deltas.items():
        expected = sum(single.deltas[name].dense() for single in singles)
        torch.testing.assert_close(delta.dense(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "target", "words"),
    [
        ("", "x", "prompt is empty"),
        ("x", " ", "target is empty"),
        ("x", None, "target is empty"),
        ([("x", "")], None, "target is empty"),
        ([], None, "nothing to edit"),
        ("x", "long " * CONTEXT, f"context is {CONTEXT}"),
    ],
)
def test_requests_that_cannot_be_carried_out(tiny_llama: LM, prompt: Any, target: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        editor_for(tiny_llama).edit(tiny_llama, prompt, target)


def test_an_editor_of_another_model_is_refused(tiny_llama: LM, tiny_gpt2: LM) -> None:
    with pytest.raises(MismatchError) as error:
        editor_for(tiny_llama).edit(tiny_gpt2, "x", "y")
    assert tiny_llama.fingerprint in str(error.value)
    assert tiny_gpt2.fingerprint in str(error.value)
    assert "tiny-gpt2" in str(error.value)
    Step(find_sites(tiny_gpt2.model)).check(tiny_gpt2)  # one that has seen no model yet fits any


# --------------------------------------------------------------------------- batches of separate edits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_batch_of_episodes_equals_separate_edits(kind: str) -> None:
    """Both the edits and the edited passes: all in one batch, or each alone from the clean model."""
    lm = build_lm(kind)
    editor, made = editor_for(lm), records_for(lm, 5)
    facts = [Request(record.prompt, record.target) for record in made]
    probes = to_texts(lm, [(record.paraphrases[0], record.target) for record in made])
    trunk, batch = Trunk(lm.model, editor.sites), collate(probes)
    with unchanged(lm.model), torch.no_grad():
        together = editor.each(lm, facts)
        with applied(lm.model, together):
            hidden = trunk.run(batch)
            logits = trunk.logits(batch, hidden)
        for i, (fact, probe) in enumerate(zip(facts, probes, strict=True)):
            edit = editor.edit(lm, fact.prompt, fact.target)
            for name, delta in edit.deltas.items():
                torch.testing.assert_close(together[name].dense()[i], delta.dense(), rtol=1e-3, atol=1e-5)
            with edit.applied(lm):
                alone = plain_logits(lm.model, collate([probe]))
            torch.testing.assert_close(logits[batch.owner == i], alone, rtol=1e-3, atol=1e-3)
            assert (alone - plain_logits(lm.model, collate([probe]))).abs().max() > 0.01


@pytest.fixture(scope="module")
def exact() -> Iterator[LM]:
    lm = build_lm("gpt2", torch.float64)
    with unchanged(lm.model):
        yield lm


def padded_changes(lm: LM, texts: list[Text], side: Literal["left", "right"]) -> dict[str, Tensor]:
    """Each text's own dense change, from one batch padded on that side."""
    sites = find_sites(lm.model)
    batch, trunk = collate(texts, pad_id=3, side=side), Trunk(lm.model, sites)
    hidden = trunk.run(batch)

    def loss() -> Tensor:
        logits = trunk.logits(batch, hidden)
        return per_example(token_nll(logits, batch.labels), batch.owner, len(texts))

    factors = capture(lm.model, sites, loss)[1]
    return {name: f.lowrank(f.delta, f.u).dense() for name, f in factors.items()}


spans = st.integers(2, 10).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=n, max_size=n), st.integers(1, n - 1)
    )
)


@settings(max_examples=25)
@given(texts=st.lists(spans.map(lambda span: Text(tuple(span[0]), span[1])), min_size=1, max_size=4))
def test_padding_and_the_rest_of_the_batch_do_not_matter(exact: LM, texts: list[Text]) -> None:
    sites = find_sites(exact.model)
    trunk = Trunk(exact.model, sites)
    factors = edit_factors(trunk, sites, texts)
    together = {name: f.lowrank(f.delta, f.u).dense() for name, f in factors.items()}
    left, right = padded_changes(exact, texts, "left"), padded_changes(exact, texts, "right")
    for i, text in enumerate(texts):
        alone = edit_factors(trunk, sites, [text])
        for site in sites:
            expected = alone[site.name].delta.T @ alone[site.name].u
            for found in (together, left, right):
                torch.testing.assert_close(found[site.name][i], expected, rtol=1e-9, atol=1e-12)


def test_a_known_trunk_output_is_not_computed_again(exact: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = find_sites(exact.model)
    trunk, texts = Trunk(exact.model, sites), [Text((5, 6, 7, 8), 2), Text((9, 3, 4), 1)]
    batch = collate(texts)
    hidden = trunk.run(batch)
    expected = edit_factors(trunk, sites, texts)
    monkeypatch.setattr(trunk, "run", lambda *_: pytest.fail("the trunk ran again"))
    for name, factors in edit_factors(trunk, sites, texts, hidden).items():
        torch.testing.assert_close(factors.delta, expected[name].delta, rtol=1e-10, atol=1e-13)
        assert torch.equal(factors.u, expected[name].u)


@pytest.mark.parametrize("name", EDITORS)
def test_every_listed_editor_is_there_under_its_own_name(name: str) -> None:
    assert issubclass(editor_class(name), Editor)
    assert editor_class(name).name == name
    editor_class(name).Config()


def test_all_parameters_are_trained(tiny_llama: LM) -> None:
    step = editor_for(tiny_llama)
    (group,) = step.parameter_groups(0.5)
    assert group["lr"] == 0.5
    assert group["params"] == [step.seen]


def test_the_method_is_found_by_its_name(
    tmp_path: Path, tiny_llama: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert editor_class("mend") is Mend
    with pytest.raises(RequestError, match=r"no editor 'bend'; there are: mend"):
        editor_class("bend")
    monkeypatch.setattr(editors, "editor_class", lambda _: Step)
    step = Step(find_sites(tiny_llama.model))
    step.save_pretrained(tmp_path / "step")
    loaded = Editor.from_pretrained(tmp_path / "step")
    assert isinstance(loaded, Step)
    assert asdict(loaded.config) == {"lr": 0.1}
    with pytest.raises(StorageError, match="'step' editor, not 'mend'"):
        Mend.from_pretrained(tmp_path / "step")
