"""Prompts in a chat template: the same tokens in editing, training, evaluation and generation, and what records it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import BEGIN, EDITOR_CASES, END, build_lm, in_slow_suite, records, unchanged
from chats import BEGUN, SPACED, TEMPLATES, TURNS, chat_lm
from emendo import Edit, Editor, Request, load
from emendo.editors import EDITORS, editor_class
from emendo.editors.in_context import InContext
from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import compose
from emendo.edits.per_request import applied_to_rows
from emendo.errors import FramingWarning, ModelError, RequestError
from emendo.evaluate import evaluate
from emendo.evaluate.sequential import evaluate_sequence
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.train import TrainConfig, train
from emendo.train.episodes import Episodes

PAIRS = [
    ("The capital of Bada is", "Oslo"),  # one token behind a space, else several
    ("Where is Bada?", "Old Town by the river"),
    ("  Say it:\n", "New Port"),
]


def turns(lm: LM, prompt: str, *answer: str) -> list[dict[str, str]]:
    answers = [{"role": "assistant", "content": text} for text in answer]
    return [{"role": "user", "content": prompt}, *answers]


def begun(lm: LM, prompt: str) -> tuple[int, ...]:
    """The tokens of a conversation up to where the assistant is to speak, by the tokenizer's own means."""
    coded: Any = lm.tokenizer.apply_chat_template(turns(lm, prompt), add_generation_prompt=True)
    return tuple(coded["input_ids"])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_begins_as_the_template_says_and_ends_with_the_target(name: str, bos: bool) -> None:
    lm = chat_lm(TEMPLATES[name], bos=bos)
    for (prompt, answer), text in zip(PAIRS, to_texts(lm, PAIRS), strict=True):
        assert text.ids[: text.start] == begun(lm, prompt)
        gap = " " if name == "spaced" else ""
        ids = lm.tokenizer(gap + answer, add_special_tokens=False)["input_ids"]
        assert text.labels == tuple(ids)
        assert text.ids.count(lm.tokenizer.convert_tokens_to_ids(BEGIN)) == (name in ("begun", "spaced"))


@pytest.mark.parametrize("name", ["turns", "begun", "spaced"])
def test_a_text_is_the_finished_conversation_up_to_the_end_of_the_target(name: str) -> None:
    lm = chat_lm(TEMPLATES[name], bos=True)
    for (prompt, answer), text in zip(PAIRS, to_texts(lm, PAIRS), strict=True):
        whole: Any = lm.tokenizer.apply_chat_template(turns(lm, prompt, answer))
        assert tuple(whole["input_ids"][: len(text.ids)]) == text.ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_and_next_tokens_read_the_same(name: str) -> None:
    lm = chat_lm(TEMPLATES[name], bos=True)
    prompts = [prompt for prompt, _ in PAIRS]
    texts, forced = lm.prompt_texts(prompts), to_texts(lm, PAIRS)
    for prompt, asked, text in zip(prompts, texts, forced, strict=True):
        assert asked.inputs == text.ids[: text.start] == begun(lm, prompt)
        ids = torch.tensor([asked.inputs])
        with torch.no_grad():
            logits = lm.model(ids).logits[0, -1]
        torch.testing.assert_close(lm.next_logits([prompt])[0], logits, rtol=1e-4, atol=1e-4)
        out: Any = lm.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        expected = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert lm.generate(prompt, 4) == expected
    assert lm.generate(prompts, 4) == [lm.generate(prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("name", ["turns", "begun", "spaced"])
def test_an_edit_teaches_the_end_of_the_turn_too(name: str) -> None:
    lm = chat_lm(TEMPLATES[name].replace("<|end|>", END), bos=True)
    end = lm.tokenizer.eos_token_id
    editor = editor_class("ft")(find_sites(lm.model))
    taught = editor.texts(lm, [Request(*pair) for pair in PAIRS])
    assert taught == to_texts(lm, PAIRS, closed=True)
    for (prompt, answer), text, open_text in zip(PAIRS, taught, to_texts(lm, PAIRS), strict=True):
        assert text.ids[: len(open_text.ids)] == open_text.ids
        assert text.ids[-1] == end
        assert text.start == open_text.start
        whole: Any = lm.tokenizer.apply_chat_template(turns(lm, prompt, answer))
        assert tuple(whole["input_ids"][: len(text.ids)]) == text.ids
    plain = lm.reading(chat=False)
    assert to_texts(plain, PAIRS, closed=True) == to_texts(plain, PAIRS)


def test_training_closes_the_targets_and_no_other_answers() -> None:
    lm = chat_lm(TURNS.replace("<|end|>", END))
    (record, *_) = made = records(2)
    (episode, *_) = Episodes(lm, made[:1], TrainConfig(batch=1, near=1, sibling=0, text=0)).batch(0)
    targets = to_texts(
        lm, [(prompt, record.target) for prompt in (record.prompt, *record.paraphrases)], closed=True
    )
    assert episode.edit == targets[0]
    assert episode.paraphrase in targets[1:]
    assert episode.locality[0] in to_texts(lm, [(probe.prompt, probe.answer) for probe in record.neighbours])


def test_a_template_without_an_end_closes_nothing() -> None:
    lm = chat_lm(
        TEMPLATES["thinking"].replace("<|end|>", END)
    )  # its generation prompt is in no finished conversation
    assert to_texts(lm, PAIRS, closed=True) == to_texts(lm, PAIRS)


def test_white_space_of_an_answer_is_kept_instead_of_the_templates_own() -> None:
    for name, template in TEMPLATES.items():
        lm = chat_lm(template)
        spaced, plain, newline = (to_texts(lm, [("Q", answer)])[0] for answer in (" A", "A", "\nA"))
        assert (spaced == plain) == (name == "spaced")
        assert lm.tokenizer.decode(newline.labels) == "\nA"
        assert lm.tokenizer.decode(spaced.labels) == " A"
        assert spaced.ids[: spaced.start] == newline.ids[: newline.start]


def test_plain_prompts_are_read_as_before() -> None:
    lm = chat_lm(BEGUN, bos=True)
    plain = lm.reading(chat=False)
    assert plain.reading(chat=False) is plain
    assert plain.model is lm.model
    assert not plain.chat
    assert to_texts(plain, PAIRS) == to_texts(build_lm("llama", bos=True), PAIRS)
    assert to_texts(plain.reading(chat=True), PAIRS) == to_texts(lm, PAIRS) != to_texts(plain, PAIRS)


def test_what_cannot_be() -> None:
    with pytest.raises(ModelError, match="tiny-llama has no chat template"):
        replace(build_lm("llama"), chat=True)
    with pytest.raises(ModelError, match="tiny-llama does not accept a user's turn and an answer: no turns"):
        chat_lm("{{ raise_exception('no turns') }}")
    lm = build_lm("t5")
    lm.tokenizer.chat_template = TURNS
    with pytest.raises(ModelError, match="Only decoders use"):
        replace(lm, chat=True)
    with pytest.raises(RequestError, match="prompt is empty"):
        to_texts(chat_lm(), [(" ", "Oslo")])
    with pytest.raises(RequestError, match="prompt is empty"):
        chat_lm().generate("\n")
    with pytest.raises(RequestError, match="context is 96"):
        to_texts(chat_lm(), [("word " * 60, "Oslo")])


def test_load(tmp_path: Path) -> None:
    lm = chat_lm(SPACED)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert to_texts(load(tmp_path, chat=True), PAIRS) == to_texts(lm, PAIRS)
    assert not load(tmp_path).chat


@pytest.mark.parametrize("name", in_slow_suite(*EDITORS, but=("mend", "in-context")))
def test_every_editor_edits_what_the_template_asks(name: str, tmp_path: Path) -> None:
    lm, kind, case = chat_lm(), editor_class(name), EDITOR_CASES[name]
    with torch.no_grad():  # the end of a turn has a row of zeros, which no edit could make the likeliest
        lm.model.get_output_embeddings().weight[lm.tokenizer.convert_tokens_to_ids(END)].normal_(std=0.2)
    sites = kind.default_sites(lm.model) if case.own_sites else find_sites(lm.model)
    editor = kind(sites, kind.Config(**case.config)).eval()
    pair = ("Where is Bada?", "Oslo")
    with unchanged(lm.model):
        edit = editor.edit(lm, *pair)
        host = editor.host(lm)
        assert host.chat
        (text,), before = to_texts(lm, [pair]), host.logits(to_texts(lm, [pair]))[0]
        with edit.applied(host) as edited:
            assert edited.chat
            assert to_texts(edited, [pair]) == [text]
            after = edited.logits([text])[0]
            assert edited.generate(pair[0], 1) == lm.tokenizer.decode(int(after[0].argmax()))
    assert not torch.equal(before, after)
    assert edit.origin.chat
    edit.save_pretrained(tmp_path / "edit")
    assert type(edit).from_pretrained(tmp_path / "edit").origin == edit.origin
    card = (tmp_path / "edit" / "README.md").read_text()
    assert "put into the model's chat template" in card
    assert "chat=True" in card


@pytest.mark.parametrize("template", [TURNS, BEGUN])
def test_in_context_tells_within_the_users_turn(template: str) -> None:
    lm = chat_lm(template, bos=True)
    edit = InContext(()).edit(lm, "Bada is", "Oslo")
    with edit.applied(lm) as edited:
        (told,) = edited.logits(to_texts(edited, [("Where is Bada?", "Oslo")]))
    whole = to_texts(lm, [("Bada is Oslo.\nWhere is Bada?", "Oslo")])
    torch.testing.assert_close(told, lm.logits(whole)[0], rtol=1e-3, atol=1e-3)


def test_rows_read_the_template_too() -> None:
    lm = chat_lm()
    edit = Mend(find_sites(lm.model), MendConfig(rank=8, alpha=0.02)).edit(lm, "Where is Bada?", "Oslo")
    assert isinstance(edit, Edit)
    unedited = lm.generate("Gude is", 4)
    with applied_to_rows(lm, [[edit], []]) as rows:
        assert rows.prompt_texts(["Gude is"]) == lm.prompt_texts(["Gude is"])
        assert rows.generate(["Bada is", "Gude is"], 4)[1] == unedited


def test_digests_of_plain_edits_do_not_speak_of_chat() -> None:
    lm = chat_lm()
    editor = Mend(find_sites(lm.model), MendConfig(rank=8))
    chat, plain = (editor.edit(each, "Bada is", "Oslo") for each in (lm, lm.reading(chat=False)))
    assert isinstance(chat, Edit)
    assert isinstance(plain, Edit)
    assert chat.origin.as_dict()["chat"] is True
    assert "chat" not in plain.origin.as_dict()
    assert compose([chat, chat]).origin.chat
    assert not compose([chat, plain]).origin.chat


def trained(lm: LM) -> Mend:
    editor = Mend(find_sites(lm.model, last=1), MendConfig(rank=4))
    train(lm, editor, records(4), records(2), TrainConfig(steps=2, batch=2, warmup=1))
    return editor.eval()


def test_an_editor_knows_how_its_prompts_were_given(tmp_path: Path) -> None:
    lm = chat_lm()
    plain = lm.reading(chat=False)
    for own, other in ((lm, plain), (plain, lm)):
        editor = trained(own)
        assert editor.chat == own.chat
        folder = tmp_path / str(own.chat)
        editor.save_pretrained(folder)
        again = Editor.from_pretrained(folder)
        again.check(own)
        ways = ("on plain prompts", "on prompts in the chat template")
        with pytest.warns(FramingWarning, match=ways[own.chat]):
            again.edit(other, [Request("Where is Bada?", "Oslo")])


def test_editors_of_before_chat_are_plain(tmp_path: Path) -> None:
    lm = chat_lm().reading(chat=False)
    trained(lm).save_pretrained(tmp_path / "editor")
    head = json.loads((tmp_path / "editor" / "editor.json").read_text())
    assert head.pop("chat") is False
    del head["checksum"]  # there was none, either
    head["format"] = 1
    (tmp_path / "editor" / "editor.json").write_text(json.dumps(head))
    Editor.from_pretrained(tmp_path / "editor").check(lm)


def test_evaluation_asks_in_the_template_and_says_so() -> None:
    lm, facts = chat_lm(), records(2)
    editor = Mend(find_sites(lm.model), MendConfig(rank=8, alpha=0.02)).eval()
    found = evaluate(lm, editor, facts)
    assert found.protocol["prompts"] == "a user's turn in the tokenizer's chat template"
    first = found.results[0].outcomes[0]
    edit = editor.edit(lm, facts[0].prompt, facts[0].target)
    with edit.applied(lm):
        (logits,) = lm.logits(to_texts(lm, [(facts[0].prompt, facts[0].target)]))
        said = lm.generate(facts[0].prompt, 8)
    labels = torch.tensor(to_texts(lm, [(facts[0].prompt, facts[0].target)])[0].labels)
    assert first.teacher_forced == bool((logits.argmax(-1) == labels).all())
    assert first.text_after == said
    in_turn = evaluate_sequence(lm, editor, facts)
    assert in_turn.protocol["prompts"] == found.protocol["prompts"]
    assert evaluate(lm.reading(chat=False), editor, facts).protocol["prompts"] == "as they stand"


def test_untrained_editors_do_not_mind() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mend(()).check(chat_lm())
