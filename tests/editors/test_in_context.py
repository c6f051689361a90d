"""In-context editing against texts that are put together by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BEGIN, CONTEXT, END, build_lm, records_for, unchanged
from damage import rewrite
from emendo import Edit
from emendo.editors import Editor, read_edit
from emendo.editors.cache import Cache, CacheConfig
from emendo.editors.in_context import ContextEdit, InContext, InContextConfig
from emendo.edits.edit import Request
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.models.lm import LM
from emendo.models.tokenization import to_texts

CASES = [("llama", False), ("gpt2", True), ("t5", False), ("bart", False)]


def told(lm: LM, n: int) -> tuple[ContextEdit, str]:
    """An edit of so many facts, and the text that the model shall read first."""
    requests = [Request(record.prompt, record.target) for record in records_for(lm, n)]
    return InContext(()).edit(lm, requests), "".join(f"{r.prompt} {r.target}.\n" for r in requests)


@torch.no_grad()
def by_hand(lm: LM, text: str, prompt: str, answer: str) -> Tensor:
    """The slow reference: the words joined before anything is tokenised, and a pass of the whole model."""
    if lm.kind == "seq2seq":
        source = lm.tokenizer(text + prompt, return_tensors="pt").input_ids
        target = [*lm.begins[:1], *lm.tokenizer(answer)["input_ids"]]
        out = lm.model(input_ids=source, decoder_input_ids=torch.tensor([target[:-1]])).logits[0]
        return out[len(lm.begins) - 1 :]
    start = len(lm.tokenizer(text + prompt)["input_ids"])
    ids = lm.tokenizer(f"{text}{prompt} {answer}", return_tensors="pt").input_ids
    logits: Tensor = lm.model(ids).logits[0, start - 1 : -1]
    return logits


@pytest.mark.parametrize(("kind", "bos"), CASES)
@pytest.mark.parametrize("facts", [1, 3])
def test_equals_joining_the_words_by_hand(kind: str, bos: bool, facts: int) -> None:
    lm = build_lm(kind, bos=bos)
    edit, text = told(lm, facts)
    assert edit.text == text
    pairs = [(p, r.target) for r in records_for(lm, 2) for p in (r.prompt, r.paraphrases[1])]
    prompts = [prompt for prompt, _ in pairs]
    with unchanged(lm.model), edit.applied(lm) as edited:
        found, words = edited.logits(to_texts(edited, pairs)), edited.generate(prompts, 5)
        likely = edited.top(prompts[1], 3)
    for rows, pair, said in zip(found, pairs, words, strict=True):
        torch.testing.assert_close(rows, by_hand(lm, text, *pair), rtol=1e-3, atol=1e-3)
        assert said == lm.generate(text + pair[0], 5)
    assert [word for word, _ in likely] == [word for word, _ in lm.top(text + prompts[1], 3)]
    clean = lm.logits(to_texts(lm, pairs))
    assert any((a - b).abs().max() > 0.1 for a, b in zip(found, clean, strict=True))


def test_behind_what_the_tokenizer_begins_with() -> None:
    """A token that opens every text stays the first; a prompt that begins with such a word of its own does not move."""
    lm = build_lm("gpt2", bos=True)
    edit, text = told(lm, 1)
    prompt = f"{END} The capital of Bada is"
    with edit.applied(lm) as edited:
        found = edited.logits(to_texts(edited, [(prompt, "Oslo")]))[0]
    torch.testing.assert_close(found, by_hand(lm, text, prompt, "Oslo"), rtol=1e-3, atol=1e-3)
    assert lm.tokenizer.decode(lm.tokenizer(text + prompt)["input_ids"]).startswith(BEGIN + text + END)


def test_the_template(tiny_llama: LM) -> None:
    editor = InContext((), InContextConfig("{target}: that is what {prompt} says {{sic}}"))
    edit = editor.edit(tiny_llama, [(" Who {x}? ", "{prompt}"), ("And", " Rome ")])
    assert edit.text == "{prompt}: that is what Who {x}? says {sic}\nRome: that is what And says {sic}\n"


@pytest.mark.parametrize(
    "template",
    ["", "{prompt}", "{target}{prompt}{x}", "{prompt} {target} {}", "{prompt} {target", "{target} {target}"],
)
def test_templates_that_tell_no_fact(template: str) -> None:
    with pytest.raises(RequestError, match=r"must hold \{prompt\} and \{target\}, each once"):
        InContextConfig(template)


# ----------------------------------------------------------------------------- what does not fit


def test_a_classifier_is_not_told_facts() -> None:
    with pytest.raises(RequestError, match="tiny-bert is a classifier, which answers with classes"):
        told(build_lm("bert"), 1)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_facts_that_leave_no_room(kind: str) -> None:
    lm = build_lm(kind)
    with pytest.raises(RequestError, match=f"the context of tiny-{kind} is {CONTEXT}: use fewer"):
        told(lm, 12)
    edit, text = told(lm, 4)
    room = CONTEXT - len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    with edit.applied(lm) as edited:
        assert edited.context == room
        fits = "The capital of Bada is"
        while len((read := to_texts(lm, [("x " + fits, "Oslo")])[0]).source or read.ids) <= room:
            fits = "x " + fits
        edited.logits(to_texts(lm, [(fits, "Oslo")]))
        edited.generate([fits], 8)
        with pytest.raises(RequestError, match=f"leave {room} in the context of tiny-{kind}, the text"):
            edited.logits([read])
        with pytest.raises(RequestError, match=f"context is {room}"):
            to_texts(edited, [("x " + fits, "Oslo")])
        with pytest.raises(RequestError, match=f"context is {CONTEXT}"):
            edited.generate(["x " * room + fits], 8)


def test_requests_that_cannot_be_carried_out(tiny_llama: LM, tiny_gpt2: LM) -> None:
    with pytest.raises(RequestError, match="nothing to edit"):
        InContext(()).edit(tiny_llama, [])
    with pytest.raises(RequestError, match="target is empty"):
        InContext(()).edit(tiny_llama, "x")
    edit, _ = told(tiny_llama, 1)
    with pytest.raises(MismatchError, match="made for 'tiny-llama'"), edit.applied(tiny_gpt2):
        pytest.fail("the edit was applied")


# ---------------------------------------------------------------------------- one in another, saved


def test_one_edit_in_another(tiny_llama: LM) -> None:
    """The inner one is asked what the outer one makes of a prompt."""
    edit, text = told(tiny_llama, 1)
    second = InContext(()).edit(tiny_llama, "Two and two are", "four")
    with edit.applied(tiny_llama) as once, second.applied(once) as twice:
        said = twice.generate("The capital of Gude is", 5)
    assert said == tiny_llama.generate(f"{text}Two and two are four.\nThe capital of Gude is", 5)
    always = Cache((), CacheConfig(radius=1e9)).edit(tiny_llama, "x", "Lima")
    with always.applied(tiny_llama) as once, second.applied(once) as twice:
        assert twice.generate("The capital of Gude is", 5) == " Lima"
        assert twice.logits(to_texts(twice, [("Bade is", "Lima")]))[0].softmax(-1).amax(-1).min() > 0.9999


def test_saved_and_loaded_it_is_the_same(tiny_llama: LM, tmp_path: Path) -> None:
    edit = dataclasses.replace(told(tiny_llama, 2)[0], card={"note": "kept"})
    edit.save_pretrained(tmp_path / "edit")
    for loaded in (read_edit(tmp_path / "edit"), ContextEdit.from_pretrained(str(tmp_path / "edit"))):
        assert isinstance(loaded, ContextEdit)
        assert (loaded.text, loaded.origin, loaded.card) == (edit.text, edit.origin, edit.card)
    with pytest.raises(StorageError, match=r"of the kind 'in-context', not 'weights'"):
        Edit.from_pretrained(tmp_path / "edit")
    InContext((), InContextConfig("{prompt}: {target}")).save_pretrained(tmp_path / "editor")
    assert Editor.from_pretrained(tmp_path / "editor").config.template == "{prompt}: {target}"


@pytest.mark.parametrize("content", [{}, {"text": 3}, "a text", None])
def test_a_damaged_edit_is_named(tiny_llama: LM, tmp_path: Path, content: Any) -> None:
    told(tiny_llama, 1)[0].save_pretrained(tmp_path / "edit")
    rewrite("edit.json", lambda head: {**head, "content": content})(tmp_path / "edit")
    with pytest.raises(StorageError) as error:
        read_edit(tmp_path / "edit")
    assert str(tmp_path / "edit") in str(error.value)
