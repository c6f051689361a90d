"""Teacher-forced passes: what the clean and the edited model make of each prompt's answer and of the other one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emendo.evaluate.asking import FORCED_TOKENS, Asked
from emendo.evaluate.cases import Case
from emendo.evaluate.metrics import all_match, answer_probability, answer_rank, mean_nll, token_match
from emendo.losses import per_example, token_kl
from emendo.store import TrunkStore
from emendo.texts import Text, length_buckets

Row = tuple[int, Case]
"""An edit's place among those that were made, and a prompt to ask under it."""


def force(rows: Sequence[Row], asked: Asked, store: TrunkStore) -> None:
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


def _answers(part: Sequence[Row], asked: Asked, store: TrunkStore) -> None:
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


def _others(part: Sequence[Row], asked: Asked, store: TrunkStore) -> None:
    cases = [case for _, case in part]
    _note_others(cases, *_passes(part, [_other(case) for case in cases], asked, store))


def _passes(
    part: Sequence[Row], texts: Sequence[Text], asked: Asked, store: TrunkStore
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
