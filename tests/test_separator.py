"""A text between prompt and answer stays with its request: whatever reads the two again reads the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cases import build_lm, records
from emendo.cli._runs import digest
from emendo.data import Record, read_records, write_records
from emendo.editors.ft import FineTuning, FineTuningConfig
from emendo.editors.in_context import InContext
from emendo.edits import Edit, Request, compose, fuse
from emendo.errors import RequestError
from emendo.evaluate import before_after, evaluate, questions
from emendo.evaluate._prompts import with_fact
from emendo.evaluate.sequential import evaluate_sequence
from emendo.ledger import Ledger
from emendo.ledger.workspace import Workspace
from emendo.models import tokenization
from emendo.models.framing import Pair, encode, joined
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes

GAP = " ->\n"
FACT = replace(records(1)[0], separator=GAP)
REQUEST = Request(FACT.prompt, FACT.target, GAP)
OWN = {prompt for prompt, _, _ in FACT.texts()}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """All prompts and answers that are tokenised."""
    seen: list[Pair] = []

    def spy(tokenizer: Any, pairs: Sequence[Pair], **options: Any) -> Any:
        seen.extend(pairs)
        return encode(tokenizer, pairs, **options)

    monkeypatch.setattr(tokenization, "encode", spy)
    return seen


@pytest.fixture(scope="module")
def lm() -> LM:
    return build_lm("llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def edit(lm: LM) -> Edit:
    return editor(lm).edit(lm, [REQUEST])


def editor(lm: LM) -> FineTuning:
    return FineTuning(find_sites(lm.model), FineTuningConfig(steps=1))


def asked_of_the_fact(read: Sequence[Pair]) -> list[Pair]:
    """The texts with a prompt of the fact, after a check that each has its separator."""
    own = [pair for pair in read if pair[0] in OWN]
    assert own and {pair[2:] for pair in own} == {(GAP,)}
    return own


def test_an_edit_is_made_of_the_text_as_typed(lm: LM, edit: Edit) -> None:
    typed = editor(lm).edit(lm, [Request(f"{FACT.prompt} ->\n", FACT.target)])
    default = editor(lm).edit(lm, FACT.prompt, FACT.target)
    (text,) = editor(lm).texts(lm, [REQUEST])
    assert lm.tokenizer.decode(text.ids) == f"{FACT.prompt}{GAP}{FACT.target}"
    assert edit.digest not in (typed.digest, default.digest)


def test_an_edit_keeps_it(edit: Edit, tmp_path: Path) -> None:
    edit.save_pretrained(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").origin.requests == (REQUEST,)
    assert Edit.from_bytes(edit.to_bytes()).origin.requests == (REQUEST,)
    assert compose([edit, edit]).origin.requests == (REQUEST, REQUEST)
    assert (
        repr(GAP).replace(">", "&gt;").replace("\\", "\\\\") in (tmp_path / "edit" / "README.md").read_text()
    )


def test_an_edit_without_one_is_saved_as_before(lm: LM) -> None:
    plain = editor(lm).edit(lm, FACT.prompt, FACT.target)
    assert plain.origin.as_dict()["requests"] == [{"prompt": FACT.prompt, "target": FACT.target}]


@pytest.mark.parametrize("separator", [7, "\ud800"])
def test_no_text(separator: Any) -> None:
    with pytest.raises(RequestError, match="separator"):
        Request("The capital is", "Oslo", separator)


def test_the_ledger_and_its_guard(lm: LM, edit: Edit, read: list[Pair], tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path, lm.fingerprint, lm.name)
    work = Workspace(lm, ledger)
    work.apply(edit, paraphrases=FACT.paraphrases, force=True)
    assert {pair[0] for pair in asked_of_the_fact(read)} == {FACT.prompt, *FACT.paraphrases}
    read.clear()
    examined = Workspace(lm, Ledger.open(tmp_path)).examine()
    (pair,) = asked_of_the_fact(read)
    assert pair == REQUEST.pair
    assert examined.outcomes[0].entry.requests == (REQUEST.as_dict(),)
    composed = work.composed()
    assert composed is not None and composed.origin.requests == (REQUEST,)


def test_fuse(lm: LM, edit: Edit, read: list[Pair]) -> None:
    fuse(
        lm, [edit], paraphrases=[FACT.paraphrases], passages=["The capital of Mirawi is far from the river."]
    )
    assert {pair[0] for pair in asked_of_the_fact(read)} == {FACT.prompt, *FACT.paraphrases}


def test_before_and_after(lm: LM, edit: Edit, read: list[Pair]) -> None:
    before_after(lm, edit, questions(FACT))
    assert {pair[0] for pair in asked_of_the_fact(read)} >= {FACT.prompt, *FACT.paraphrases[:3]}


def evaluated(lm: LM, *facts: Record) -> str:
    return str(evaluate(lm, editor(lm), facts, generated=False).protocol["prompts"])


def sequential(lm: LM, *facts: Record) -> str:
    return str(evaluate_sequence(lm, editor(lm), facts, generated=False).protocol["prompts"])


@pytest.mark.parametrize("measure", [evaluated, sequential])
def test_evaluations(lm: LM, read: list[Pair], measure: Any) -> None:
    other = records(2)[1]
    assert measure(lm, FACT) == f"as they stand, {GAP!r} before the answer"
    assert {pair[0] for pair in asked_of_the_fact(read)} >= OWN
    assert measure(lm, FACT, other) == f"as they stand, {GAP!r} before the answer of 1 of 2 records"
    assert measure(lm, other) == "as they stand"
    assert (other.prompt, other.target, None) in read


def test_training(lm: LM, read: list[Pair]) -> None:
    Episodes(lm, [FACT, replace(records(2)[1], unrelated=(), neighbours=(), separator="")], TrainConfig())
    asked_of_the_fact(read)
    assert {pair[2] for pair in read if pair[0] == records(2)[1].prompt} == {""}


def test_a_fact_in_the_context(lm: LM) -> None:
    made = InContext((), None).edit(lm, [REQUEST])
    assert made.text == f"{FACT.prompt}{GAP}{FACT.target}.\n"
    assert with_fact(FACT, "And?") == f"{FACT.prompt}{GAP}{FACT.target}. And?"
    chinese = InContext((), None).edit(lm, "爱因斯坦出生于", "北京")
    assert chinese.text == "爱因斯坦出生于北京.\n"


@pytest.fixture(params=["", " ", "\n", " -> ", None])
def gap(request: pytest.FixtureRequest) -> Iterator[str | None]:
    return request.param  # type: ignore[no-any-return]


def test_record_files(tmp_path: Path, gap: str | None) -> None:
    fact = replace(FACT, separator=gap)
    write_records([fact], tmp_path / "facts.jsonl")
    assert read_records(tmp_path / "facts.jsonl").records == (fact,)
    assert ("separator" in (tmp_path / "facts.jsonl").read_text()) is (gap is not None)
    assert (digest([fact]) == digest([replace(fact, separator=None)])) is (gap is None)
    assert joined(*fact.texts()[0]) == f"{fact.prompt}{' ' if gap is None else gap}{fact.target}"
