"""Second moments against autograd through the whole model, streamed and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from cases import build_lm, plain_logits, random_texts, unchanged
from emendo.errors import DataError, RequestError
from emendo.low_rank import LowRank, applied
from emendo.models import moments as module
from emendo.models.lm import LM
from emendo.models.moments import (
    Moments,
    kept_moments,
    passages_of,
    running_text,
    second_moments,
    spread,
)
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate


def texts() -> list[Text]:
    torch.manual_seed(1)
    return [Text(text.ids, 1) for text in random_texts("llama", 6, 9, 5, 7)]


def test_they_are_those_of_whole_passes() -> None:
    """The reference reads every text by itself, and takes inputs and gradients with hooks of its own."""
    lm = build_lm("llama", torch.float64)
    sites = find_sites(lm.model, last=2)
    with unchanged(lm.model):
        found = second_moments(lm, sites, texts())
    count = sum(len(text.inputs) for text in texts())
    for site in sites:
        inputs = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
        outputs = torch.zeros(site.d_out, site.d_out, dtype=torch.float64)
        for text in texts():
            seen = []

            def hook(m, args, output, seen=seen):  # type: ignore[no-untyped-def]
                output = output.detach().requires_grad_()
                seen.append((args[0].detach(), output))
                return output

            with site.module(lm.model).register_forward_hook(hook):
                logits = plain_logits(lm.model, collate([text]))
            (u, output) = seen[0]
            loss = cross_entropy(logits, torch.tensor(text.labels), reduction="sum")
            (delta,) = torch.autograd.grad(loss, output)
            inputs += u[0].mT @ u[0]
            outputs += delta[0].mT @ delta[0]
        own = found[site.name]
        assert own.tokens == count
        torch.testing.assert_close(own.inputs, inputs / count)
        torch.testing.assert_close(own.outputs, outputs / count)


def test_streamed_they_are_those_of_all_texts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm("llama", torch.float64)
    sites = find_sites(lm.model, last=1)
    expected = second_moments(lm, sites, texts())
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    for name, own in second_moments(lm, sites, texts()).items():
        torch.testing.assert_close(own.inputs, expected[name].inputs)
        torch.testing.assert_close(own.outputs, expected[name].outputs)


def test_the_average_of_two_is_that_of_their_tokens() -> None:
    lm = build_lm("llama", torch.float64)
    sites = find_sites(lm.model, last=1)
    first, rest, both = (second_moments(lm, sites, some) for some in (texts()[:1], texts()[1:], texts()))
    for name, expected in both.items():
        found = first[name].averaged(rest[name])
        assert found.tokens == expected.tokens
        torch.testing.assert_close(found.inputs, expected.inputs)
        torch.testing.assert_close(found.outputs, expected.outputs)
        assert first[name].averaged(None) is first[name]


def test_they_are_kept_by_model_matrix_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm("llama")
    sites = find_sites(lm.model, last=2)
    folder = tmp_path / "moments"
    said = ["The capital of Bafopa is Rome and more.", "Water is made of hydrogen and oxygen."]
    first = kept_moments(lm, sites[:2], said, folder)
    computed = []

    def counted(lm, sites, texts, compute=second_moments):  # type: ignore[no-untyped-def]
        computed.extend(site.name for site in sites)
        return compute(lm, sites, texts)

    monkeypatch.setattr(module, "second_moments", counted)
    again = kept_moments(lm, sites, said, folder)
    assert list(again) == [site.name for site in sites]
    assert computed == [site.name for site in sites[2:]]
    for name, own in first.items():
        assert torch.equal(own.inputs, again[name].inputs)
        assert torch.equal(own.outputs, again[name].outputs)
        assert own.tokens == again[name].tokens
    kept_moments(lm, sites[:1], said[:1], folder)
    kept_moments(build_lm("llama", seed=1), sites[:1], said, folder)
    assert computed[len(sites) - 2 :] == [sites[0].name] * 2


def test_the_text_of_an_edited_model_is_not_kept_as_that_of_the_clean_one(
    tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path))
    (site, *_) = find_sites(tiny_llama.model, last=1)
    large = LowRank(10 * torch.ones(site.d_out, 1), torch.ones(1, site.d_in))
    with applied(tiny_llama.model, {site.name: large}):
        edited = running_text(tiny_llama, "", 3)
    clean = running_text(tiny_llama, "", 3)
    assert len(clean) == 3 and clean != edited
    assert running_text(tiny_llama, "", 3) == clean


def test_the_spread_counts_directions() -> None:
    assert spread(torch.eye(5)) == pytest.approx(5)
    assert spread(torch.diag(torch.tensor([3.0, 0.0, 0.0]))) == pytest.approx(1)


def test_what_has_no_moments_is_said(tmp_path: Path) -> None:
    lm = build_lm("bert")
    with pytest.raises(RequestError, match="is a classifier"):
        kept_moments(lm, find_sites(lm.model, last=1))
    lm = build_lm("llama")
    with pytest.raises(RequestError, match="no text"):
        second_moments(lm, find_sites(lm.model, last=1), [])
    with pytest.raises(DataError, match="cannot be read"):
        passages_of(tmp_path / "none.txt")
    (tmp_path / "few.txt").write_text("too few words\n")
    with pytest.raises(DataError, match="at least 8 words"):
        passages_of(tmp_path / "few.txt")
    (tmp_path / "some.txt").write_text("one two three\nThis line has some more words than eight in it.\n")
    assert passages_of(tmp_path / "some.txt") == ["This line has some more words than eight in it."]


def test_the_other_moments_can_be_weighed() -> None:
    own, other = Moments(torch.eye(3), torch.eye(2), 4), Moments(3 * torch.eye(3), torch.eye(2), 4)
    assert own.averaged(other, 0.0) is own
    torch.testing.assert_close(own.averaged(other, 3.0).inputs, 2.5 * torch.eye(3))
