"""Each row of a batch under its own set of edits, against one row at a time under `Edit.applied`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from architectures import CLASSES
from cases import build_lm, unchanged
from emendo.edits.edit import Edit, Origin, Request
from emendo.edits.per_request import applied_to_rows
from emendo.errors import MismatchError, RequestError
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts

PROMPTS = ["The capital of Fosoba is", "The river in", "The capital of Fosoba is", "A word on"]

TARGETS = (["Old Town", "Oslo", "Rome", "it"], [CLASSES[0], CLASSES[1], CLASSES[0], CLASSES[2]])


def an_edit(lm: LM, rank: int) -> Edit:
    deltas = {
        site.name: LowRank(torch.randn(site.d_out, rank), torch.randn(rank, site.d_in)).scale(0.3)
        for site in find_sites(lm.model)
    }
    return Edit(deltas, Origin(lm.fingerprint, lm.name, "mend", {}, (Request("a", "b"),), "2025-01-31"))


def alone(lm: LM, edits: list[Edit], prompt: str) -> str:
    attached = [edit.attach(lm) for edit in edits]
    found: str = lm.generate(prompt, 6)
    for attachment in attached:
        attachment.detach()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "bert"])
def test_every_row_is_as_if_it_were_alone(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    a, b = an_edit(lm, 1), an_edit(lm, 3)
    sets = [[a], [], [b, a], [a]]
    with unchanged(lm.model):
        with applied_to_rows(lm, sets) as edited:
            found = edited.generate(PROMPTS, 6)
        assert found == [alone(lm, edits, prompt) for edits, prompt in zip(sets, PROMPTS, strict=True)]
        plain = lm.generate(PROMPTS, 6)
    assert found[1] == plain[1]
    texts = to_texts(lm, list(zip(PROMPTS, TARGETS[kind == "bert"], strict=True)))
    with applied_to_rows(lm, sets) as edited:
        rows = edited.logits(texts)
    for text, edits, row in zip(texts, sets, rows, strict=True):
        attached = [edit.attach(lm) for edit in edits]
        torch.testing.assert_close(row, lm.logits([text])[0])
        for attachment in attached:
            attachment.detach()
    if kind == "bert":
        assert set(found) <= set(CLASSES)
    else:
        assert found[0] != plain[0] and found[2] != found[0]  # the edits do something


def test_a_row_without_edits_is_bit_for_bit_what_it_was(tiny_llama: LM) -> None:
    ids = torch.randint(0, 100, (4, 7))

    @torch.no_grad()
    def logits() -> Tensor:
        found: Tensor = tiny_llama.model(ids).logits
        return found

    before = logits()
    with applied_to_rows(tiny_llama.model, [[], [an_edit(tiny_llama, 2)], [], []]):
        after = logits()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.allclose(after[1], before[1])
    assert torch.equal(logits(), before)


def test_flattened_tokens() -> None:
    """OPT's blocks flatten their tokens before the second matrix sees them."""
    lm = build_lm("opt", torch.float64)
    sets = [[an_edit(lm, 2)], [], [], [an_edit(lm, 2)]]
    with applied_to_rows(lm, sets) as edited:
        found = edited.generate(PROMPTS, 4)
    assert found == [
        alone(lm, edits, prompt)[: len(text)]
        for edits, prompt, text in zip(sets, PROMPTS, found, strict=True)
    ]


def test_another_number_of_rows_is_refused(tiny_llama: LM) -> None:
    with (
        applied_to_rows(tiny_llama, [[an_edit(tiny_llama, 1)], []]),
        pytest.raises(RequestError, match=r"2 rows.*3"),
    ):
        tiny_llama.generate(PROMPTS[:3], 2)
    with unchanged(tiny_llama.model):
        tiny_llama.generate(PROMPTS[:3], 2)  # the hooks are gone


def test_another_models_edit_is_refused(tiny_llama: LM, tiny_gpt2: LM) -> None:
    with pytest.raises(MismatchError), applied_to_rows(tiny_llama, [[an_edit(tiny_gpt2, 1)]]):
        pytest.fail("the edit was applied")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, tiny_llama: LM) -> None:
    half = LM(copy.deepcopy(tiny_llama.model).to(dtype), tiny_llama.tokenizer)
    edit, ids = an_edit(half, 2), torch.randint(0, 100, (2, 7))
    with torch.no_grad():
        with applied_to_rows(half, [[edit], []]):
            found = half.model(ids).logits
        with edit.applied(half):
            edited = half.model(ids).logits[0]
        plain = half.model(ids).logits
    assert torch.equal(found[1], plain[1])
    torch.testing.assert_close(found[0], edited, rtol=0.05, atol=0.05)
    assert not torch.allclose(found[0], plain[0], rtol=0.05, atol=0.05)
