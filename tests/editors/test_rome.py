"""ROME: whitening against dense solves, the values against autograd through the whole model, and its subjects."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from cases import build_lm, in_slow_suite, plain_logits, records, unchanged
from emendo._subject import find_subject
from emendo.editors._contexts import contexts, subject_end
from emendo.editors._values import Background, Whitening, inputs_of
from emendo.editors.rome import Rome, RomeConfig
from emendo.edits.edit import Request
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import collate
from emendo.models.tokenization import to_texts


def fact() -> Request:
    record = records(3)[2]
    return Request(record.prompt, record.target)


@pytest.mark.parametrize("rows", [5, 40])
def test_the_direction_is_that_of_a_dense_solve(rows: int) -> None:
    torch.manual_seed(0)
    x, others, key = torch.randn(rows, 12), torch.randn(3, 12), torch.randn(12)
    q = Whitening(x, 0.1).direction(key, others)
    wide, near, k = x.double(), others.double(), key.double()
    moment = wide.mT @ wide / rows
    C = moment + 0.1 * moment.trace() / 12 * torch.eye(12, dtype=torch.float64) + 10 * near.mT @ near / 3
    solved = torch.linalg.solve(C, k)
    torch.testing.assert_close(q, solved / (solved @ k), rtol=1e-6, atol=1e-9)
    for _ in range(20):  # the answer to other rows is smallest among all that answer 1 to the key
        step = torch.randn(12, dtype=torch.float64)
        other = q + 0.1 * (step - (step @ k) / (k @ k) * k)
        assert other @ k == pytest.approx(1)
        assert q @ C @ q < other @ C @ other


@pytest.mark.parametrize("kind", ["llama", *in_slow_suite("gpt2")])
def test_the_values_move_as_autograd_says(kind: str) -> None:
    """The reference reads every text by itself, through the whole model, with logits and no trunk."""
    lm = build_lm(kind, torch.float64)
    sites = find_sites(lm.model, last=2)
    config = RomeConfig(steps=3, lr=0.05, contexts=2, per_step=2, until=1e-9, enough=1e-9, stay=11)
    editor = Rome(sites, config)
    with unchanged(lm.model):
        (found,) = [{name: change[0] for name, change in editor.each(lm, [fact()]).items()}]
    search = editor.search(lm, fact())
    values = {name: torch.zeros_like(change.left).requires_grad_() for name, change in found.items()}
    adam = torch.optim.Adam(values.values(), 0.05 * search.unit)
    for _ in range(3):
        changes = {name: LowRank(value, found[name].right) for name, value in values.items()}
        with applied(lm.model, changes):
            nll = [
                cross_entropy(plain_logits(lm.model, collate([text])), torch.tensor(text.labels))
                for text in search.texts
            ]
            after = [plain_logits(lm.model, collate([text])).log_softmax(-1) for text in search.stay]
        before = [plain_logits(lm.model, collate([text])).log_softmax(-1) for text in search.stay]
        kl = [
            kl_div(q, p, log_target=True, reduction="batchmean") for p, q in zip(before, after, strict=True)
        ]
        adam.zero_grad()
        (nll[0] + torch.stack(nll[1:]).mean() + config.c_kl * torch.stack(kl).mean()).backward()
        adam.step()
    for name, change in found.items():
        assert change.rank == 1
        assert values[name].abs().max() > 0
        torch.testing.assert_close(change.left, values[name].detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["llama", *in_slow_suite("gpt2")])
def test_the_kl_is_that_of_two_whole_passes(kind: str) -> None:
    """The reference reads every text by itself through the whole model, without and with the change."""
    lm = build_lm(kind, torch.float64)
    search = Rome(find_sites(lm.model, last=2), RomeConfig(stay=11)).search(lm, fact())
    torch.manual_seed(0)
    values = [torch.randn(site.d_out, 1, dtype=torch.float64, requires_grad=True) for site in search.sites]
    changes = {
        site.name: LowRank(value, search.right[site.name])
        for site, value in zip(search.sites, values, strict=True)
    }
    _, kl = search._losses(changes, 0)
    slopes = torch.autograd.grad(kl.sum(), values)
    expected = []
    for text in search.stay:
        before = plain_logits(lm.model, collate([text])).log_softmax(-1)
        with applied(lm.model, changes):
            after = plain_logits(lm.model, collate([text])).log_softmax(-1)
        expected.append(kl_div(after, before.detach(), log_target=True, reduction="batchmean"))
    assert torch.stack(expected).mean() > 1e-4
    torch.testing.assert_close(kl, torch.stack(expected), rtol=1e-6, atol=1e-9)
    for slope, slow in zip(slopes, torch.autograd.grad(torch.stack(expected).sum(), values), strict=True):
        assert slow.abs().max() > 1e-4
        torch.testing.assert_close(slope, slow, rtol=1e-5, atol=1e-8)


def test_the_weight_of_the_kl_changes_the_values_and_lowers_the_kl(tiny_llama: LM) -> None:
    kls, values = [], []
    for weight in (0.0, 30.0):
        config = RomeConfig(steps=6, stay=11, until=1e-9, enough=1e-9, c_kl=weight)
        search = Rome(Rome.default_sites(tiny_llama.model), config).search(tiny_llama, fact())
        changes = search.run()
        values.append(torch.cat([change.left for change in changes.values()]))
        kls.append(float(search._losses(changes, 0)[1].mean()))
    assert kls[1] < 0.9 * kls[0]
    assert (values[0] - values[1]).norm() > 0.05 * values[0].norm()


def test_the_kl_is_on_texts_that_the_directions_do_not_leave_out(tiny_llama: LM) -> None:
    editor = Rome(Rome.default_sites(tiny_llama.model))
    search, background = editor.search(tiny_llama, fact()), editor.background(tiny_llama)
    left_out = [text.ids for text in (*search.near, *background.texts)]
    assert len(search.near) >= 6
    assert len(search.stay) >= 9
    for text in search.stay:
        assert all(other[: len(text.ids)] != text.ids for other in left_out)


def test_an_edit_is_as_small_as_its_contexts_allow(tiny_llama: LM) -> None:
    """The reference reads every context by itself, through the whole model, at sixteen factors."""
    search = Rome(Rome.default_sites(tiny_llama.model), RomeConfig(contexts=3)).search(tiny_llama, fact())
    torch.manual_seed(0)
    site = search.sites[0]

    def losses(factor: float) -> list[float]:
        with applied(tiny_llama.model, {site.name: change.scale(factor)}):
            return [
                float(
                    cross_entropy(plain_logits(tiny_llama.model, collate([text])), torch.tensor(text.labels))
                )
                for text in search.texts
            ]

    change = LowRank(torch.zeros(site.d_out, 1, requires_grad=True), search.right[site.name])
    (slope,) = torch.autograd.grad(search._losses({site.name: change}, 0)[0].sum(), [change.left])
    change = LowRank(-slope / slope.norm() * search.unit * 10, change.right)
    worst = [max(losses(i / 16)) for i in range(17)]
    assert worst == sorted(worst, reverse=True)  # so that a smallest factor exists
    search.config = RomeConfig(enough=(worst[10] + worst[11]) / 2)
    assert search.smallest_factor({site.name: change}) == 11 / 16
    search.config = RomeConfig(enough=worst[16] / 2)
    assert search.smallest_factor({site.name: change}) == 1


def test_the_values_are_what_the_key_is_answered(tiny_llama: LM) -> None:
    editor = Rome(Rome.default_sites(tiny_llama.model), RomeConfig(steps=3))
    changes = editor.each(tiny_llama, [fact()])
    search = editor.search(tiny_llama, fact())
    rows = inputs_of(search.store, editor.sites, search.texts)
    ends = [subject_end(tiny_llama, text, find_subject(fact().prompt)) for text in search.texts]
    for name, change in changes.items():
        key = torch.stack([own[end] for own, end in zip(rows[name], ends, strict=True)]).mean(0)
        torch.testing.assert_close(change[0](key), change.left[0, :, 0], rtol=1e-3, atol=1e-5)


def test_contexts_mention_the_subject(tiny_llama: LM) -> None:
    made = contexts("The capital of Bafo is", "Bafo", 8, [["some", "own", "words"]], Random(0))
    assert made[0] == "The capital of Bafo is"
    assert len(made) == 9
    assert all("Bafo" in context for context in made)
    for context in made:
        (text,) = to_texts(tiny_llama, [(context, "Oslo")])
        end = subject_end(tiny_llama, text, "Bafo")
        before, after = (tiny_llama.tokenizer.decode(text.ids[:stop]) for stop in (end, end + 1))
        assert "Bafo" in after
        assert "Bafo" not in before


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("What is the twin city of Lyon? It is", "Lyon"),
        ("Edwin of Northumbria follows", "Edwin of Northumbria"),
        ("The original language of The Mistress of the Inn was", "The Mistress of the Inn"),
        ("John A. Smith's field is", "John A. Smith"),
        ("Apple A5 was created by", "Apple A5"),
        ("Redigo premieres on", "Redigo"),
        ("The owner of iCloud is", "iCloud"),
        ("The meaning of photosynthesis is", "photosynthesis"),
        ("capital of france", "capital"),
        ("法国的首都是", "法国的首都是"),
        ("?", "?"),
    ],
)
def test_the_subject_is_the_longest_name(prompt: str, subject: str) -> None:
    assert find_subject(prompt) == subject


def test_a_given_subject_is_used(tiny_llama: LM) -> None:
    sites = Rome.default_sites(tiny_llama.model)
    request = Request("Bafo has a river called", "Oslo")
    guessed, given = (
        Rome(sites, RomeConfig(steps=1, subject=subject)).search(tiny_llama, request).right
        for subject in ("", "river")
    )
    assert any(not torch.equal(guessed[name], given[name]) for name in guessed)


@pytest.mark.parametrize(("kind", "matrix"), [("llama", "down_proj"), ("gpt2", "c_proj")])
def test_it_writes_into_the_hidden_state_above_the_middle(kind: str, matrix: str) -> None:
    lm = build_lm(kind)
    sites = Rome.default_sites(lm.model)
    assert {site.block for site in sites} == {2}  # of four
    assert all(site.name.endswith(matrix) and not site.attention for site in sites)


def test_what_edits_share_is_made_once(tiny_llama: LM) -> None:
    editor = Rome(Rome.default_sites(tiny_llama.model), RomeConfig(steps=1))
    background = editor.background(tiny_llama)
    assert isinstance(background, Background)
    editor.each(tiny_llama, [fact(), fact()])
    assert editor.background(tiny_llama) is background
