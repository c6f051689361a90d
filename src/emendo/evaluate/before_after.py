"""A model's answers before and after an edit, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import torch

from emendo._storage import finite
from emendo.data.schema import Record
from emendo.editors import Editor
from emendo.edits.edit import BaseEdit, Request
from emendo.evaluate.metrics import all_match, answer_match, answer_probability
from emendo.evaluate.results import Kind
from emendo.models.framing import Pair
from emendo.models.lm import LM
from emendo.models.text import Text, greedy
from emendo.models.tokenization import to_texts

_WORD_TOKENS = 4  # tokens in which a word that began is completed
_NO_ANSWER = 1e-6  # less likely tokens are not shown, such as all but one where the answer is looked up


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to ask before and after an edit.

    Attributes:
        kind: the edit prompt itself, a paraphrase of it, a near neighbour or an unrelated prompt.
        prompt: the prompt.
        target: the edit's target; None takes it from the edit.
        answer: the correct answer, where it is known and not the target.
        separator: the text between the prompt and an answer; None chooses it by the script.
    """

    kind: Kind
    prompt: str
    target: str | None = None
    answer: str | None = None
    separator: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the most likely next tokens, continued to the end of its word (or of the target or known answer).

    Attributes:
        text: the word.
        probability: of its first token.
    """

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a before/after table.

    Attributes:
        kind: as in :class:`Question`.
        prompt: the prompt.
        target: the edit's target.
        answer: the correct answer, where it is known and not the target.
        before: the clean model's most likely answers, most likely first, all different.
        after: the edited model's.
        target_before: probability of the whole target in the clean model, the product over its tokens.
        target_after: the same in the edited model.
        reached: whether all target tokens are the edited model's argmax.
        changed: whether the most likely next token differs from before.
    """

    kind: Kind
    prompt: str
    target: str
    answer: str | None
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    target_before: float
    target_after: float
    reached: bool
    changed: bool


def questions(
    record: Record, *, paraphrases: int = 3, neighbours: int = 3, unrelated: int = 3
) -> list[Question]:
    """A record's edit prompt and some of its other prompts."""
    target, between = record.target, record.separator
    return [
        Question("edit", record.prompt, target, record.answer, between),
        *(
            Question("paraphrase", prompt, target, record.answer, between)
            for prompt in record.paraphrases[:paraphrases]
        ),
        *(
            Question("neighbour", probe.prompt, target, probe.answer, between)
            for probe in record.neighbours[:neighbours]
        ),
        *(
            Question("unrelated", probe.prompt, target, probe.answer, between)
            for probe in record.unrelated[:unrelated]
        ),
    ]


@torch.no_grad()
def before_after(
    lm: LM, edit: BaseEdit, asked: Sequence[Question], *, k: int = 3, host: LM | None = None
) -> list[Row]:
    """Ask the model each question without and with the edit.

    Args:
        lm: the model, of any kind; it is not changed.
        edit: the edit, of any kind.
        asked: the questions, for example from :func:`questions`.
        k: the number of next tokens (or classes) for each; answers with the same text are given once.
        host: the model that the edit belongs to, where it is another one (see :meth:`emendo.editors.Editor.host`).

    Raises:
        MismatchError: the edit was made for another model.
        RequestError: an empty prompt, or one that is too long for the model.
    """
    if not asked:
        return []
    targets = [question.target or edit.origin.requests[0].target for question in asked]
    known = [
        [target.strip(), *([question.answer.strip()] if question.answer else [])]
        for question, target in zip(asked, targets, strict=True)
    ]
    pairs = [(one.prompt, target, one.separator) for one, target in zip(asked, targets, strict=True)]
    before = _ask(lm, pairs, known, k)
    with edit.applied(host or lm) as edited:
        after = _ask(edited, pairs, known, k)
    return [
        Row(
            kind=question.kind,
            prompt=question.prompt,
            target=targets[i],
            answer=question.answer,
            before=before.answers[i],
            after=after.answers[i],
            target_before=before.target[i],
            target_after=after.target[i],
            reached=after.reached[i],
            changed=before.top[i] != after.top[i],
        )
        for i, question in enumerate(asked)
    ]


def edit_with_answers(
    lm: LM, editor: Editor, request: Request, asked: Sequence[Question], *, k: int = 3
) -> tuple[BaseEdit, list[Row]]:
    """An edit with its figures in its card, and the model's answers before and after it.

    Where no weights change, the edit's rank and norm are 0.

    Args:
        lm: the model; it is not changed.
        editor: makes the edit.
        request: the prompt and its new answer.
        asked: the questions; the first one is the edit's own prompt.
        k: as for :func:`before_after`.

    Raises:
        RequestError: a text does not fit the model, or the edit holds NaN or infinite numbers.
        MismatchError: the editor was trained for another model.
    """
    edit = editor.edit(lm, [request])
    edit.check_numbers()
    host = editor.host(lm)
    rows = before_after(lm, edit, asked, k=k, host=host)
    card = {
        "target_before": rows[0].target_before,
        "target_after": rows[0].target_after,
        "reached": rows[0].reached,
        "rank": edit.rank,
        "relative_norm": finite(fmean(edit.relative_norms(host).values() or [0.0])),
        "rows": [asdict(row) for row in rows],
    }
    return edit.with_card(card), rows


@dataclass(frozen=True, slots=True)
class _Side:
    """The answers of a model, one of each for each prompt.

    Attributes:
        top: the most likely next token.
        answers: the ``k`` most likely answers.
        target: the probability of the target.
        reached: whether all of the target's tokens are the argmax.
    """

    top: list[int]
    answers: list[tuple[Answer, ...]]
    target: list[float]
    reached: list[bool]


def _ask(lm: LM, pairs: Sequence[Pair], known: list[list[str]], k: int) -> _Side:
    texts = to_texts(lm, pairs)
    rows = lm.logits(texts)
    logits = torch.cat(rows).float()
    labels = torch.tensor([label for text in texts for label in text.labels], device=logits.device)
    count = torch.tensor([len(text.labels) for text in texts], device=logits.device)
    owner = torch.arange(len(texts), device=logits.device).repeat_interleave(count)
    target = answer_probability(logits, labels, owner, len(texts)).tolist()
    reached = all_match(logits.argmax(-1), labels, owner, len(texts)).tolist()

    first = torch.stack([row[0] for row in rows]).float().softmax(-1)
    values, tokens = first.topk(min(k, first.shape[-1]))
    words = iter(_words(lm, texts, tokens.tolist(), known))
    answers = [_distinct([Answer(next(words), value) for value in row]) for row in values.tolist()]
    return _Side(tokens[:, 0].tolist(), answers, target, reached)


def _distinct(answers: list[Answer]) -> tuple[Answer, ...]:
    """The answers without those that read like a more likely one, such as the same word without its leading space."""
    first: dict[str, Answer] = {}
    for answer in answers:
        if not first or answer.probability >= _NO_ANSWER:
            first.setdefault(answer.text, answer)
    return tuple(first.values())


def _words(
    lm: LM, texts: Sequence[Text], likeliest: list[list[int]], known: Sequence[Sequence[str]]
) -> list[str]:
    """The word that each likely next token begins, by greedy decoding; a known phrase is given in full."""
    if lm.kind == "classifier":
        return [lm.labels[number] for numbers in likeliest for number in numbers]
    begun = [
        replace(text, ids=(*text.ids[: text.start], token))
        for text, tokens in zip(texts, likeliest, strict=True)
        for token in tokens
    ]
    wanted = [phrases for phrases, tokens in zip(known, likeliest, strict=True) for _ in tokens]
    special = set(lm.tokenizer.all_special_ids)

    def said(place: int, new: list[int]) -> str:
        text: str = lm.tokenizer.decode([begun[place].ids[-1], *new], skip_special_tokens=True)
        return text

    def done(place: int, new: list[int]) -> bool:
        return new[-1] in lm.ends or _is_whole(said(place, new), wanted[place])

    phrases = lm.tokenizer([phrase for some in known for phrase in some], add_special_tokens=False)
    new = max(_WORD_TOKENS, *map(len, phrases["input_ids"]))
    limit = lm.context if lm.kind == "causal" else None
    added = greedy(lm.logits, begun, new, done=done, limit=limit)
    return [
        "(end)" if text.ids[-1] in special else _word(said(place, added[place]), wanted[place])
        for place, text in enumerate(begun)
    ]


def _is_whole(text: str, known: Sequence[str]) -> bool:
    """Whether :func:`_word` no longer depends on how the text continues."""
    said = text.lstrip()
    ended = text.lstrip(" ").startswith("\n") or any(map(str.isspace, said))
    return ended and not any(phrase.startswith(said.rstrip()) for phrase in known)


def _word(text: str, known: Sequence[str]) -> str:
    """The first word of a continuation, or the known phrase it begins with; a line break is shown as a symbol."""
    for phrase in known:
        if text.lstrip().startswith(phrase) and answer_match(text, phrase):
            return phrase
    if text.lstrip(" ").startswith("\n") or not text.strip():
        return "↵" if "\n" in text else "␣"
    word = text.split(maxsplit=1)[0].rstrip("\ufffd")  # half a character
    return word.rstrip(".,;:!?") or word or "\ufffd"
