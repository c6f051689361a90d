"""Many requests in one call: in batches, and in memory that does not grow, as one by one."""

from __future__ import annotations

import pytest
import torch

from cases import build_lm, records, unchanged
from emendo.editors import gradient
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Request
from emendo.models.lm import LM
from emendo.models.sites import find_sites

COUNT = 24


def _editor(lm: LM) -> Mend:
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=8, alpha=1e-2)).double()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return editor.train()


def _requests(count: int = COUNT) -> list[Request]:
    found = [Request(record.prompt, record.target) for record in records(count)]
    return [
        *found,
        Request("A much longer prompt about nothing in particular, which goes on and on to", "Rome"),
    ]


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        *((100, kind) for kind in ("llama", "t5")),
        *((1, "llama"), (10_000, "bert")),
        *(pytest.param(100, kind, marks=pytest.mark.slow) for kind in ("gpt2", "bert", "opt")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "t5"), (10_000, "llama"))),
    ],
)
def test_each_request_has_the_change_that_it_has_alone(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_lm(kind, torch.float64)
    editor = _editor(lm)
    requests = _requests()
    if lm.kind == "classifier":
        requests = [Request(r.prompt, lm.labels[i % len(lm.labels)]) for i, r in enumerate(requests)]
    monkeypatch.setattr(gradient, "in_batches", lambda texts: _cut(texts, tokens))
    with unchanged(lm.model):
        many = editor.each(lm, requests)
        assert editor.training
        for place in (0, 7, COUNT):
            alone = editor.each(lm, requests[place : place + 1])
            for name, change in alone.items():
                assert change.dense().norm() > 0
                torch.testing.assert_close(
                    many[name].dense()[place], change.dense()[0], rtol=1e-8, atol=1e-14
                )


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_together_is_the_sum(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm("llama", torch.float64)
    editor = _editor(lm)
    expected = {name: change.dense().sum(0) for name, change in editor.each(lm, _requests()).items()}
    monkeypatch.setattr(gradient, "in_batches", lambda texts: _cut(texts, tokens))
    for name, change in editor.together(lm, _requests()).items():
        torch.testing.assert_close(change.dense(), expected[name], rtol=1e-8, atol=1e-14)


def test_the_change_of_many_takes_no_more_room_than_the_matrices() -> None:
    lm = build_lm("llama", torch.float64)
    edit = _editor(lm).together(lm, _requests(150))
    for site in find_sites(lm.model, last=2):
        assert edit[site.name].rank <= min(site.shape)


def _cut(texts: list[object], tokens: int) -> list[list[int]]:
    return ORIGINAL(texts, tokens)  # type: ignore[arg-type]


ORIGINAL = gradient.in_batches
