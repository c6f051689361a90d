"""Teacher-forced passes: what the clean and the edited model make of each prompt's answer and of the other one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emendo.evaluate._prompts import Case, Continuations, by_budget
from emendo.evaluate.edited_models import FORCED_TOKENS, EditedModels
from emendo.evaluate.metrics import (
    all_match,
    answer_match,
    answer_probability,
    answer_rank,
    full_match,
    mean_nll,
    same_answer,
    token_match,
)
from emendo.models.losses import per_example, token_kl
from emendo.models.text import Text, length_buckets
from emendo.models.trunk_cache import TrunkCache

Row = tuple[int, Case]
"""An edit's place among those that were made, and a prompt to ask under it."""


def score_forced(rows: Sequence[Row], asked: EditedModels, store: TrunkCache) -> None:
    """Ask every prompt under its edit and note what was found in the cases.

    Args:
        rows: the prompts; the store holds their texts.
        asked: the edits.
        store: the trunk's outputs.
    """
    for part in length_buckets(rows, lambda item: item[1].text.size, FORCED_TOKENS):
        _answers(part, asked, store)
    apart = [(row, case) for row, case in rows if case.other_text is not None and not case.shares]
    for part in length_buckets(apart, lambda item: _other(item[1]).size, FORCED_TOKENS):
        _others(part, asked, store)


def _answers(part: Sequence[Row], asked: EditedModels, store: TrunkCache) -> None:
    cases = [case for _, case in part]
    before, after, labels, owner = _passes(part, [case.text for case in cases], asked, store)
    count, device = len(cases), before.device
    was, now = before.argmax(-1), after.argmax(-1)
    local = torch.tensor([case.local for case in cases], device=device)
    wanted = torch.where(local[owner], was, labels)
    _note(
        cases,
        {
            "teacher_forced": all_match(now, wanted, owner, count),
            "token_level": token_match(now, wanted, owner, count),
            "known": all_match(was, labels, owner, count),
            "before": answer_probability(before, labels, owner, count),
            "after": answer_probability(after, labels, owner, count),
            "kl": per_example(token_kl(before, after), owner, count).clamp(min=0),
            "share_before": token_match(was, labels, owner, count),
            "share_after": token_match(now, labels, owner, count),
            "rank_before": answer_rank(before, labels, owner, count),
            "rank_after": answer_rank(after, labels, owner, count),
            "nll_before": mean_nll(before, labels, owner, count),
            "nll_after": mean_nll(after, labels, owner, count),
        },
    )
    sharing = [i for i, case in enumerate(cases) if case.shares]
    if sharing:
        first = torch.searchsorted(owner, torch.tensor(sharing, device=device))
        token = torch.tensor([_other(cases[i]).labels[0] for i in sharing], device=device)
        alone = torch.arange(len(sharing), device=device)
        _note_others([cases[i] for i in sharing], before[first], after[first], token, alone)


def _others(part: Sequence[Row], asked: EditedModels, store: TrunkCache) -> None:
    cases = [case for _, case in part]
    _note_others(cases, *_passes(part, [_other(case) for case in cases], asked, store))


def _passes(
    part: Sequence[Row], texts: Sequence[Text], asked: EditedModels, store: TrunkCache
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits ``[n, vocabulary]`` of the clean and the edited model, labels and owners ``[n]``."""
    tokens, before = store.logits(texts)
    after = torch.cat(asked.logits([row for row, _ in part], texts))
    return before, after, tokens.labels.to(before.device), tokens.owner.to(before.device)


def _note_others(cases: Sequence[Case], before: Tensor, after: Tensor, labels: Tensor, owner: Tensor) -> None:
    count = len(cases)
    columns = {}
    for side, logits in (("before", before), ("after", after)):
        columns[f"other_{side}"] = answer_probability(logits, labels, owner, count)
        columns[f"other_rank_{side}"] = answer_rank(logits, labels, owner, count)
        columns[f"other_nll_{side}"] = mean_nll(logits, labels, owner, count)
    _note(cases, columns)


def _note(cases: Sequence[Case], columns: dict[str, Tensor]) -> None:
    for name, column in columns.items():
        for case, value in zip(cases, column.tolist(), strict=True):
            case.found[name] = value


def _other(case: Case) -> Text:
    assert case.other_text is not None
    return case.other_text


# --------------------
# Free generation: greedy continuations of prompts by the clean and the edited model, and whether they are right.


def score_generated(rows: Sequence[Row], asked: EditedModels, clean: Continuations) -> None:
    """Let every prompt be continued under its edit and note what was said in the cases.

    Args:
        rows: the prompts; those for which no token is to be generated are left out.
        asked: the edits.
        clean: the clean model's continuations.
    """
    wanted = [(row, case) for row, case in rows if case.budget]
    clean.ensure([case for _, case in wanted])
    for part in by_budget(wanted, lambda item: item[1]):
        prompts = [case.prompt for _, case in part]
        texts = asked.generate([row for row, _ in part], prompts, part[0][1].budget)
        for (_, case), text in zip(part, texts, strict=True):
            case.found["text_after"] = text
            if case.local:
                case.found["generated"] = same_answer(case.found["text_before"], text, case.answer)
            else:
                case.found["generated"] = answer_match(text, case.answer)
                case.found["exact"] = full_match(text, case.answer)
