"""What a model answers before and after an edit, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emendo.data.batch import to_texts
from emendo.data.schema import Record
from emendo.edit import Edit
from emendo.evaluate.metrics import all_match, answer_match, answer_probability
from emendo.evaluate.results import Kind
from emendo.models import LM
from emendo.texts import collate

_WORD_TOKENS = 4  # tokens in which a word that began is completed


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to look at before and after an edit.

    Attributes:
        kind: the edit prompt itself, a paraphrase of it, a near neighbour or an unrelated prompt.
        prompt: the prompt.
        target: the edit's target; None takes it from the edit.
        answer: the right answer, where it is known and not the target.
    """

    kind: Kind
    prompt: str
    target: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the most likely next tokens, written out to the end of its word (or of the target or right answer).

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
        answer: the right answer, where it is known and not the target.
        before: the clean model's likeliest answers, best first, no two alike.
        after: the edited model's.
        target_before: probability of the whole target in the clean model, the product over its tokens.
        target_after: the same in the edited model.
        reached: whether all target tokens are the edited model's argmax.
        changed: whether the likeliest next token is another one than before.
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
    target = record.target
    return [
        Question("edit", record.prompt, target, record.answer),
        *(
            Question("paraphrase", prompt, target, record.answer)
            for prompt in record.paraphrases[:paraphrases]
        ),
        *(
            Question("neighbour", probe.prompt, target, probe.answer)
            for probe in record.neighbours[:neighbours]
        ),
        *(
            Question("unrelated", probe.prompt, target, probe.answer)
            for probe in record.unrelated[:unrelated]
        ),
    ]


@torch.no_grad()
def before_after(lm: LM, edit: Edit, asked: Sequence[Question], *, k: int = 3) -> list[Row]:
    """Ask the model each question without and with the edit.

    Args:
        lm: the model; it is not changed.
        edit: the edit.
        asked: the questions, for example from :func:`questions`.
        k: how many next tokens to look at for each; answers that read alike are given once.

    Raises:
        MismatchError: the edit was made for another model.
        RequestError: an empty prompt, or one that is too long for the model.
    """
    if not asked:
        return []
    targets = [question.target or edit.origin.requests[0].target for question in asked]
    known = [
        [target, *([question.answer] if question.answer else [])]
        for question, target in zip(asked, targets, strict=True)
    ]
    prompts = [question.prompt for question in asked]
    before = _ask(lm, prompts, targets, known, k)
    with edit.applied(lm):
        after = _ask(lm, prompts, targets, known, k)
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


@dataclass(frozen=True, slots=True)
class _Side:
    """The answers of the model as it stands, one of each for each prompt.

    Attributes:
        top: the likeliest next token.
        answers: the ``k`` likeliest answers.
        target: the probability of the target.
        reached: whether all of the target's tokens are the argmax.
    """

    top: list[int]
    answers: list[tuple[Answer, ...]]
    target: list[float]
    reached: list[bool]


def _ask(lm: LM, prompts: list[str], targets: list[str], known: list[list[str]], k: int) -> _Side:
    texts = to_texts(lm, list(zip(prompts, targets, strict=True)))
    batch = collate(texts)
    logits = _logits(lm, batch.input_ids, batch.attention_mask, batch.positions)
    labels, owner = batch.labels.to(logits.device), batch.owner.to(logits.device)
    target = answer_probability(logits, labels, owner, len(texts)).tolist()
    reached = all_match(logits.argmax(-1), labels, owner, len(texts)).tolist()

    ids = [list(lm.tokenizer(prompt.rstrip())["input_ids"]) for prompt in prompts]
    length = max(map(len, ids))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    last = torch.tensor([i * length + len(row) - 1 for i, row in enumerate(ids)])
    values, tokens = _logits(lm, padded, mask, last).softmax(-1).topk(k)
    begun = [[*row, token] for row, best in zip(ids, tokens.tolist(), strict=True) for token in best]
    words = iter(_complete(lm, begun, [phrases for phrases in known for _ in range(k)]))
    answers = [_distinct([Answer(next(words), value) for value in row]) for row in values.tolist()]
    return _Side(tokens[:, 0].tolist(), answers, target, reached)


def _distinct(answers: list[Answer]) -> tuple[Answer, ...]:
    """Without answers that read like a likelier one, such as the same word without its leading blank."""
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.text, answer)
    return tuple(first.values())


def _logits(lm: LM, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` at ``positions [n]`` of the flattened, right-padded ``[prompts, tokens]``."""
    logits = lm.model(input_ids=input_ids.to(lm.device), attention_mask=attention_mask.to(lm.device)).logits
    rows: Tensor = logits.flatten(0, 1)[positions.to(logits.device)].float()
    return rows


def _complete(lm: LM, begun: list[list[int]], known: list[list[str]]) -> list[str]:
    """The word that each prompt's last token begins, greedily continued; in full where it is a known phrase."""
    phrases = lm.tokenizer([phrase for some in known for phrase in some], add_special_tokens=False)[
        "input_ids"
    ]
    length, pad = max(map(len, begun)), lm.tokenizer.pad_token_id
    new = max(_WORD_TOKENS, *map(len, phrases))
    if lm.context is not None:
        new = min(new, lm.context - length)
    rows = [row[-1:] for row in begun]
    if new > 0:
        padded = torch.tensor([[pad] * (length - len(row)) + row for row in begun])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in begun])
        rows = lm.model.generate(
            input_ids=padded.to(lm.device),
            attention_mask=mask.to(lm.device),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=pad,
        )[:, length - 1 :].tolist()
    special = set(lm.tokenizer.all_special_ids)
    texts = lm.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [
        "(end)" if row[0] in special else _word(text, phrases)
        for row, text, phrases in zip(rows, texts, known, strict=True)
    ]


def _word(text: str, known: Sequence[str]) -> str:
    """The first word of a continuation, or the known phrase with which it begins; a line break is shown as one."""
    for phrase in known:
        if text.lstrip().startswith(phrase) and answer_match(text, phrase):
            return phrase
    if text.lstrip(" ").startswith("\n") or not text.strip():
        return "↵" if "\n" in text else "␣"
    word = text.split(maxsplit=1)[0].rstrip("\ufffd")  # half a character
    return word.rstrip(".,;:!?") or word or "\ufffd"
