"""The cache against a loop over its entries: which is the nearest, whether it is near enough, what it then says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONTEXT, build_lm, of_kind, records_for, unchanged
from damage import Damage, drop_tensor, remove, rewrite
from emendo import Edit
from emendo.editors import Editor, read_edit
from emendo.editors.cache import Cache, CacheConfig, CacheEdit
from emendo.edits.edit import Request
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import to_texts

KINDS = ("llama", "gpt2", "t5", "bart", "bert")


def cache(lm: LM, n: int, **settings: Any) -> tuple[CacheEdit, list[Request]]:
    requests = [Request(record.prompt, record.target) for record in records_for(lm, n)]
    return Cache((), CacheConfig(**settings)).edit(lm, requests), requests


@torch.no_grad()
def states(lm: LM, ids: list[int], layer: int = -1) -> Tensor:
    """The slow reference: a pass of the whole model over one text, `[tokens, width]`; it leaves hooks on the model."""
    tokens = torch.tensor([ids])
    if lm.kind == "seq2seq":
        start = torch.tensor([lm.begins])
        out = lm.model(input_ids=tokens, decoder_input_ids=start, output_hidden_states=True)
        return out.encoder_hidden_states[layer][0]
    return lm.model(input_ids=tokens, output_hidden_states=True).hidden_states[layer][0]


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def look_up(query: Tensor, keys: list[Tensor], radius: float) -> int | None:
    """The place of the nearest key that is nearer than the radius."""
    nearest = min(range(len(keys)), key=lambda i: distance(query, keys[i]))
    return nearest if distance(query, keys[nearest]) < radius else None


@pytest.mark.parametrize(("kind", "layer"), [*((kind, -1) for kind in KINDS), ("llama", 2), ("t5", 0)])
def test_equals_a_loop_over_the_entries(kind: str, layer: int) -> None:
    lm, twin = build_lm(kind), build_lm(kind)
    facts = records_for(lm, 5)
    asked = [(p, r.target) for r in facts for p in (r.prompt, *r.paraphrases)]
    queries = [states(twin, lm.tokenizer(prompt)["input_ids"], layer).mean(0) for prompt, _ in asked]
    keys, targets = queries[:9:3], [text.labels for text in to_texts(lm, asked[:9:3])]
    between = sorted(min(distance(query, key) for key in keys) for query in queries)
    radius = between[len(between) // 2] * 1.0001  # about half of the prompts are near
    edit, _ = cache(lm, 3, radius=radius, layer=layer)
    torch.testing.assert_close(edit.keys, torch.stack(keys), rtol=1e-4, atol=1e-5)
    texts, found = to_texts(lm, asked), []
    with unchanged(lm.model), edit.applied(lm) as edited:
        got, words, clean = edited.logits(texts), edited.generate([p for p, _ in asked], 4), lm.logits(texts)
        plain = lm.generate([p for p, _ in asked], 4)
    for i, query in enumerate(queries):
        entry = look_up(query, keys, radius)
        expected = clean[i].clone()
        if entry is not None:
            for place, token in enumerate(targets[entry][: len(expected)]):
                expected[place] = 0
                expected[place, token] = 20
            said = lm.tokenizer.decode(targets[entry][:4], skip_special_tokens=True)
            assert words[i] == (lm.labels[targets[entry][0]] if lm.kind == "classifier" else said)
        else:
            assert words[i] == plain[i]
        torch.testing.assert_close(got[i], expected, rtol=0, atol=0)
        found.append(entry)
    assert None in found and set(found) >= {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_no_radius_and_a_boundless_one(kind: str) -> None:
    lm = build_lm(kind)
    facts = records_for(lm, 6)
    texts = to_texts(lm, [(p, r.target) for r in facts for p in (r.prompt, *r.paraphrases)])
    prompts = [record.paraphrases[0] for record in facts]
    nothing, _ = cache(lm, 1, radius=0)
    with nothing.applied(lm) as edited:
        for found, plain in zip(edited.logits(texts), lm.logits(texts), strict=True):
            assert torch.equal(found, plain)
        assert edited.generate(prompts, 5) == lm.generate(prompts, 5)
        assert edited.top(prompts[0]) == lm.top(prompts[0])
    always, (request,) = cache(lm, 1, radius=1e9)
    target = to_texts(lm, [(request.prompt, request.target)])[0].labels
    with always.applied(lm) as edited:
        for rows, text in zip(edited.logits(texts), texts, strict=True):
            known = min(len(target), len(text.labels))
            assert rows.argmax(-1)[:known].tolist() == list(target[:known])
            assert rows.log_softmax(-1)[range(known), target[:known]].exp().min() > 0.9999
        assert {text.strip() for text in edited.generate(prompts, 12)} == {request.target}
        assert edited.top(prompts[0], 1)[0][1] > 0.9999


def test_the_radius_itself_is_outside(tiny_llama: LM) -> None:
    edit, _ = cache(tiny_llama, 1, radius=5)
    edit = dataclasses.replace(edit, keys=torch.tensor([[0.0, 0.0], [9.0, 0.0]]), targets=((1, 2), (3,)))
    queries = torch.tensor([[3.0, 4.0], [3.0, 3.999], [4.51, 0.0], [-5.001, 0.0], [9.0, 0.0]])
    assert edit.found(queries) == [(), (1, 2), (3,), (), (3,)]


def test_the_key_does_not_hang_on_the_answer(tiny_gpt2: LM) -> None:
    keys = [
        Cache(()).edit(tiny_gpt2, "The capital of Bada is", t).keys for t in ("Rome", "Old Town by the sea")
    ]
    assert torch.equal(*keys)


# ----------------------------------------------------------------------------------- token by token


def running(lm: LM, ids: list[int]) -> list[Tensor]:
    """The mean over the tokens before each token that follows the first."""
    rows = states(lm, ids)
    return [rows[:end].mean(0) for end in range(1, len(ids) + 1)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_looking_up_before_every_token(kind: str) -> None:
    lm, twin = build_lm(kind), build_lm(kind)
    (record,) = records_for(lm, 1)
    (text,) = to_texts(lm, [(record.prompt, "Old Town by the river")])
    keys = running(twin, list(text.inputs))[text.start - 1 :]
    assert len(keys) == len(text.labels) > 3
    asked = [Text(text.ids, 1), *to_texts(lm, [(p, record.target) for p in record.paraphrases])]
    queries = [running(twin, list(t.inputs))[t.start - 1 :] for t in asked]
    between = sorted(min(distance(q, key) for key in keys) for some in queries for q in some)
    radius = between[len(between) * 3 // 4] * 1.0001  # zero at the fact's own tokens
    editor = Cache((), CacheConfig(radius=radius, lookup="token"))
    edit = editor.edit(lm, record.prompt, "Old Town by the river")
    torch.testing.assert_close(edit.keys, torch.stack(keys), rtol=1e-4, atol=1e-5)
    assert edit.targets == tuple((token,) for token in text.labels)
    with edit.applied(lm) as edited:
        rows = edited.logits(asked)
        words = edited.generate([record.prompt, *record.paraphrases], 6)
    found = set()
    for some, got, plain in zip(queries, rows, lm.logits(asked), strict=True):
        for query, row, clean in zip(some, got, plain, strict=True):
            entry = look_up(query, keys, radius)
            expected = (
                clean
                if entry is None
                else torch.zeros_like(clean).index_fill(0, torch.tensor(text.labels[entry]), 20)
            )
            assert torch.equal(row, expected)
            found.add(entry)
    assert None in found and len(found) > 2
    for prompt, said in zip((record.prompt, *record.paraphrases), words, strict=True):
        ids = list(lm.tokenizer(prompt)["input_ids"])
        for _ in range(6):
            entry = look_up(running(twin, ids)[-1], keys, radius)
            plain = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(plain if entry is None else text.labels[entry])
        assert said == lm.tokenizer.decode(ids[-6:], skip_special_tokens=True)


@pytest.mark.parametrize("kind", [of_kind("seq2seq")[0], of_kind("classifier")[0]])
def test_token_by_token_is_for_decoders(kind: str) -> None:
    with pytest.raises(RequestError, match=f"lookup=token is for decoders, and tiny-{kind} is none"):
        cache(build_lm(kind), 1, lookup="token")


# ---------------------------------------------------------------------------------- wrong, and saved


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"radius": -1}, "radius must be at least 0, not -1"),
        ({"radius": math.nan}, "radius must be a number, not nan"),
        ({"lookup": "word"}, "lookup must be one of prompt, token, not 'word'"),
        ({"logit": 0}, "logit must be above 0"),
        ({"layer": 5}, "layer=5: tiny-llama has the hidden states 0 to 4"),
        ({"layer": -6}, "layer=-6"),
    ],
)
def test_senseless_settings(tiny_llama: LM, setting: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        cache(tiny_llama, 1, **setting)


def test_requests_that_cannot_be_carried_out(tiny_llama: LM, tiny_gpt2: LM) -> None:
    with pytest.raises(RequestError, match="nothing to edit"):
        Cache(()).edit(tiny_llama, [])
    with pytest.raises(RequestError, match=f"context is {CONTEXT}"):
        Cache(()).edit(tiny_llama, "x", "long " * CONTEXT)
    edit, _ = cache(tiny_llama, 1)
    with pytest.raises(MismatchError, match="made for 'tiny-llama'"), edit.applied(tiny_gpt2):
        pytest.fail("the edit was applied")


def test_saved_and_loaded_it_is_the_same(tiny_llama: LM, tmp_path: Path) -> None:
    edit, _ = cache(tiny_llama, 3, radius=2.5)
    edit = dataclasses.replace(edit, card={"note": "kept"})
    edit.save_pretrained(tmp_path / "edit")
    for loaded in (read_edit(tmp_path / "edit"), CacheEdit.from_pretrained(str(tmp_path / "edit"))):
        assert isinstance(loaded, CacheEdit)
        assert torch.equal(loaded.keys, edit.keys)
        assert (loaded.targets, loaded.config, loaded.card) == (edit.targets, edit.config, edit.card)
        assert loaded.origin == edit.origin
    with pytest.raises(StorageError, match=r"of the kind 'cache', not 'weights'; emendo\.editors\.read_edit"):
        Edit.from_pretrained(tmp_path / "edit")
    Cache((), edit.config).save_pretrained(tmp_path / "editor")
    assert Editor.from_pretrained(tmp_path / "editor").config == edit.config


DAMAGES: dict[str, Damage] = {
    "no keys": drop_tensor("edit.safetensors", "keys"),
    "no tensors": remove("edit.safetensors"),
    "no targets": rewrite("edit.json", lambda head: {**head, "content": {}}),
    "a target too few": rewrite("edit.json", lambda head: {**head, "content": {"targets": [[1]]}}),
    "content is a text": rewrite("edit.json", lambda head: {**head, "content": "targets"}),
    "settings of something else": rewrite(
        "edit.json", lambda head: {**head, "origin": {**head["origin"], "settings": {"rank": 4}}}
    ),
    "another editor's": rewrite(
        "edit.json", lambda head: {**head, "origin": {**head["origin"], "editor": "mend"}}
    ),
    "an unknown editor's": rewrite(
        "edit.json", lambda head: {**head, "origin": {**head["origin"], "editor": "os:system"}}
    ),
    "no editor": rewrite("edit.json", lambda head: {**head, "origin": "somewhere"}),
    "newer format": rewrite("edit.json", lambda head: {**head, "format": 99}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_edit_is_named(tiny_llama: LM, tmp_path: Path, damage: Damage) -> None:
    cache(tiny_llama, 2)[0].save_pretrained(tmp_path / "edit")
    damage(tmp_path / "edit")
    with pytest.raises(StorageError) as error:
        read_edit(tmp_path / "edit")
    assert str(tmp_path / "edit") in str(error.value)
