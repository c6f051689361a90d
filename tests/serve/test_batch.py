"""A running batch: rows join, leave and have edits of their own, and each is answered as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from cases import build_lm, build_tokenizer
from emendo.edits.edit import Edit
from emendo.models.lm import LM
from emendo.serve._batch import Batch, Row, probabilities, row_of
from emendo.serve._text import TextStream
from emendo.serve.backend import Ask, InForce, Part
from memory.test_bank import FACTS, an_edit

PROMPTS = [
    "Hello, how are you?",
    FACTS[0][0],
    "A word",
    "The river in Dorumi is called the longest one of all",
]
KINDS = ["llama", "gpt2", "mistral", "opt"]  # mistral's window is shorter than the prompts: rows cannot join


def under(*edits: Edit) -> InForce:
    return InForce(1, tuple(Part(edit.digest, edit, (i,)) for i, edit in enumerate(edits, 1)))


def rows(lm: LM, prompts: list[str], forces: list[InForce], tokens: int = 8) -> list[Row]:
    asks = [Ask(prompt, max_tokens=tokens, logprobs=3) for prompt in prompts]
    return [row_of(lm, ask, force) for ask, force in zip(asks, forces, strict=True)]


def run(batch: Batch, found: dict[int, str]) -> None:
    """Finish a batch, dropping rows when they end."""
    while batch.rows:
        own = list(batch.rows)
        pieces = batch.step()
        for row, piece in zip(own, pieces, strict=True):
            found[id(row)] = found.get(id(row), "") + piece.text
        batch.keep([i for i, piece in enumerate(pieces) if piece.finish is None])


def alone(lm: LM, prompt: str, edits: list[Edit], tokens: int) -> str:
    from emendo.edits import applied_to_rows

    with applied_to_rows(lm, [edits]) as edited:
        text: str = edited.generate(prompt, tokens)
        return text


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_answered_as_if_it_were_alone(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    one, two = (an_edit(lm, FACTS[i], seed=i) for i in (0, 1))
    sets: list[list[Edit]] = [[], [one], [two], [one, two]]
    made = [
        rows(lm, [prompt], [under(*edits)], tokens)[0]
        for prompt, edits, tokens in zip(PROMPTS, sets, (9, 4, 7, 6), strict=True)
    ]
    batch, found = Batch(lm), dict[int, str]()

    def join(new: list[Row]) -> None:
        for row, piece in zip(new, batch.join(new), strict=True):
            found[id(row)] = piece.text

    join(made[:2])
    if batch.joins:
        for row, piece in zip(list(batch.rows), batch.step(), strict=True):
            found[id(row)] += piece.text
        join(made[2:])
        run(batch, found)
    else:
        run(batch, found)
        join(made[2:])
        run(batch, found)
    assert batch.joins == (kind != "mistral") or not batch.rows
    for row, prompt, edits, tokens in zip(made, PROMPTS, sets, (9, 4, 7, 6), strict=True):
        assert found[id(row)] == alone(lm, prompt, edits, tokens)


def logits_of(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    forward = Batch._forward

    def watched(self: Batch, *args: Any) -> Tensor:
        seen.append(forward(self, *args))
        return seen[-1]

    monkeypatch.setattr(Batch, "_forward", watched)
    return seen


def test_off_is_the_base_model_bit_for_bit(monkeypatch: pytest.MonkeyPatch, tiny_llama: LM) -> None:
    """Beside edited rows a row without edits gives the bits that it gives in the same batch without any edit."""
    edit, off = an_edit(tiny_llama, FACTS[0]), InForce(0)
    runs = []
    for forces in ([under(edit), off, under(edit), off], [off] * 4):
        batch = Batch(tiny_llama)
        seen = logits_of(batch, monkeypatch)
        batch.join(rows(tiny_llama, PROMPTS, forces))
        for _ in range(3):
            for row in batch.rows:  # the same tokens are read in both runs
                row.out[-1] = 5
            batch._last = torch.full_like(batch._last, 5)
            batch.step()
        runs.append(torch.stack(seen))
    assert torch.equal(runs[0][:, [1, 3]], runs[1][:, [1, 3]])
    assert not torch.equal(runs[0][:, [0, 2]], runs[1][:, [0, 2]])


def test_without_edits_a_batch_is_that_of_generate(monkeypatch: pytest.MonkeyPatch, tiny_llama: LM) -> None:
    batch = Batch(tiny_llama)
    seen = logits_of(batch, monkeypatch)
    batch.join(rows(tiny_llama, PROMPTS, [InForce(0)] * 4))
    for _ in range(5):
        batch.step()
    inputs = tiny_llama._batch(PROMPTS)
    want = tiny_llama.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.allclose(torch.stack(seen), torch.stack(want.logits), atol=1e-6)
    start = inputs["input_ids"].shape[1]
    assert [row.out for row in batch.rows] == want.sequences[:, start:].tolist()


def test_a_row_ends_at_its_end_token(tiny_llama: LM) -> None:
    batch = Batch(tiny_llama)
    (row,) = rows(tiny_llama, PROMPTS[:1], [InForce(0)])
    logits = torch.zeros(1, len(tiny_llama.tokenizer))
    logits[0, tiny_llama.ends[0]] = 1.0
    ((piece,), _) = batch._advance([row], logits)
    assert (piece.text, piece.finish, piece.generated) == ("", "stop", 1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.5, 0.3), (1.0, 1e-9)])
def test_samples_have_the_probabilities_of_transformers(temperature: float, top_p: float) -> None:
    logits = torch.randn(40, dtype=torch.float64) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    want = TopPLogitsWarper(top_p)(None, warped)[0].softmax(-1)
    assert torch.allclose(probabilities(logits, temperature, top_p), want)


@settings(max_examples=25)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), st.lists(st.text(min_size=1, max_size=3))
)
def test_pieces_of_text_add_up_and_hold_no_half_character(text: str, stop: list[str]) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [at for each in stop if (at := whole.find(each)) >= 0]
    stream, sent = TextStream(tokenizer, stop), ""
    for i, token in enumerate(ids):
        piece, stopped = stream.add([token], last=i == len(ids) - 1)
        sent += piece
        assert whole.startswith(sent)
        if stopped:
            break
    assert sent == (whole[: min(ends)] if ends else whole)
