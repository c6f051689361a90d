"""EWC: its Fisher information against the gradients of single examples, and its penalty against the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cases import build_lm, plain_logits, random_texts, records_for, unchanged
from emendo.data import Probe
from emendo.editors import Editor, ewc
from emendo.editors.ewc import Ewc, EwcConfig, fisher
from emendo.editors.ft_penalised import PenalisedConfig, PenalisedFineTuning
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import passage_texts


@pytest.fixture(scope="module")
def exact() -> LM:
    return build_lm("gpt2", torch.float64)


def gradients(lm: LM, text: Text, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the NLL of these labels at one text, summed over them, by a plain pass; ``[d_out, d_in]``."""
    sites = find_sites(lm.model)
    weights = [site.module(lm.model).weight for site in sites]
    for weight in weights:
        weight.requires_grad_()
    loss = cross_entropy(plain_logits(lm.model, collate([text])), labels, reduction="sum")
    slopes = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {site.name: g.T if site.transposed else g for site, g in zip(sites, slopes, strict=True)}


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
def test_the_fisher_information_is_the_mean_square_of_the_gradients_of_single_examples(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the answers that were drawn, recorded as they come; several passes of several texts."""
    lm = build_lm(kind, torch.float64)
    texts, drawn = random_texts(kind, 9, 5, 7, 5), []
    nll, draw = ewc._drawn_nll, torch.multinomial

    def spy(store: object, part: Sequence[Text], random: torch.Generator) -> Tensor:
        found: list[Tensor] = []
        monkeypatch.setattr(torch, "multinomial", lambda *a, **k: found.append(draw(*a, **k)) or found[-1])
        losses = nll(store, part, random)  # type: ignore[arg-type]
        labels = found[0].squeeze(-1).split([len(text.labels) for text in part])
        drawn.extend(zip(part, labels, strict=True))
        return losses

    monkeypatch.setattr(ewc, "_drawn_nll", spy)
    monkeypatch.setattr(ewc, "_PASS_TOKENS", 16)
    with unchanged(lm.model):
        found = fisher(lm, find_sites(lm.model), texts, seed=3)
    assert len(drawn) == 4
    assert any(list(text.labels) != labels.tolist() for text, labels in drawn)
    expected: dict[str, Tensor] = {}
    for text, labels in drawn:
        for name, own in gradients(lm, text, labels).items():
            expected[name] = expected.get(name, torch.zeros_like(own)) + own.square()
    count = sum(len(text.labels) for text in texts)
    for name, own in found.items():
        torch.testing.assert_close(own, expected[name] / count, rtol=1e-6, atol=1e-12)


def test_the_answers_are_drawn_from_the_model() -> None:
    """Of a classifier every answer can be tried: the mean over the draws nears the mean by probability."""
    lm = build_lm("bert", torch.float64)
    (text,) = random_texts("bert", 6)
    odds = plain_logits(lm.model, collate([text])).softmax(-1)[0]
    every = [gradients(lm, text, torch.tensor([label])) for label in range(len(odds))]
    found = fisher(lm, find_sites(lm.model), [text] * 600)
    for name, own in found.items():
        expected = sum(p * g[name].square() for p, g in zip(odds, every, strict=True))
        assert float((own - expected).norm()) <= 0.15 * float(expected.norm()), name


def test_with_equal_weights_it_is_the_l2_penalty(exact: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [Request(record.prompt, record.target) for record in records_for(exact, 2)]
    sites = find_sites(exact.model)
    shared = {"coefficient": 0.7, "steps": 3, "lr": 1e-3}
    monkeypatch.setattr(
        Ewc, "importance", lambda self, lm: {s.name: torch.ones(s.d_out, s.d_in).double() for s in sites}
    )
    found = Ewc(sites, EwcConfig(**shared)).together(exact, facts)
    expected = PenalisedFineTuning(sites, PenalisedConfig(norm="l2", **shared)).together(exact, facts)
    for name, change in found.items():
        torch.testing.assert_close(change.dense(), expected[name].dense(), rtol=1e-9, atol=1e-12)


def test_a_larger_coefficient_spares_the_important_weights(exact: LM) -> None:
    """The weighted size falls, and the change moves to the entries that matter less."""
    record, sizes, shares = records_for(exact, 1)[0], [], []
    for coefficient in (1e-3, 30.0):
        editor = Ewc(find_sites(exact.model), EwcConfig(coefficient=coefficient, texts=8, lr=3e-3, steps=20))
        changes = editor.edit(exact, record.prompt, record.target).deltas
        importance = editor.importance(exact)
        squares = {name: change.dense().square() for name, change in changes.items()}
        sizes.append(sum(float((importance[name] * own).sum()) for name, own in squares.items()))
        shares.append(sizes[-1] / sum(float(own.sum()) for own in squares.values()))
    assert sizes[1] < 0.5 * sizes[0]
    assert shares[1] < 0.7 * shares[0]


def test_the_texts_of_the_base_task(exact: LM, tmp_path: Path) -> None:
    """A decoder's own passages, unless there are given examples, which are saved; computed once."""
    editor = Ewc(find_sites(exact.model), EwcConfig(texts=3))
    own = editor.importance(exact)
    assert editor.importance(exact) is own
    expected = fisher(exact, editor.sites, passage_texts(exact, own_passages(exact, 3), 64))
    assert all(torch.equal(own[name], expected[name]) for name in own)
    editor.set_locality([Probe("The capital of Fosoba is", "Oslo")])
    given = editor.importance(exact)
    assert not any(torch.equal(own[name], given[name]) for name in own)
    editor.save_pretrained(tmp_path / "editor")
    loaded = Editor.from_pretrained(tmp_path / "editor")
    assert isinstance(loaded, Ewc)
    assert all(torch.equal(value, given[name]) for name, value in loaded.importance(exact).items())


def test_a_classifier_needs_examples() -> None:
    lm = build_lm("bert")
    record = records_for(lm, 1)[0]
    with pytest.raises(RequestError, match="ewc needs prompts whose answers must not change, and for a cl"):
        Ewc(find_sites(lm.model)).edit(lm, record.prompt, record.target)
