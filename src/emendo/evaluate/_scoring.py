"""Scoring: the clean and the edited model's answers to prompts, teacher forced and by free generation.

Trunk outputs and the clean model's continuations are computed once for many prompts. Their batches are fixed beforehand
from all prompts of an evaluation, and each is computed when the first of its items is needed, so that the value of an
item never depends on earlier requests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from emendo.evaluate._prompts import PromptCase, by_budget
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
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_kl
from emendo.models.text import Text, length_buckets
from emendo.models.trunk_cache import TrunkCache

Row = tuple[int, PromptCase]
"""The number of an edit, and a prompt to ask under it."""

_TRUNK_TOKENS = 512  # of a batch; the cache's own batches are no smaller


# ------------------------------------------------------------------------------------- computed only once


class LazyBatches:
    """Batches of items, each computed when one of its items is needed.

    Args:
        batches: the items, each in one batch.
        key: two items with the same key are the same.
        compute: computes a batch.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[Any]],
        key: Callable[[Any], Hashable],
        compute: Callable[[Sequence[Any]], object],
    ) -> None:
        self._key, self._compute = key, compute
        self._batches = list(batches)
        self._open = {key(item): number for number, batch in enumerate(self._batches) for item in batch}

    def ensure(self, items: Iterable[Any]) -> None:
        """Compute the batches of these items, unless they have been computed."""
        for number in sorted({self._open[key] for item in items if (key := self._key(item)) in self._open}):
            self._compute(self._batches[number])
            for item in self._batches[number]:
                del self._open[self._key(item)]


def trunk_batches(store: TrunkCache, texts: Iterable[Text]) -> LazyBatches:
    """The trunk outputs of these texts, except those in the cache."""
    missing = store.missing(texts)
    parts = length_buckets(missing, lambda text: len(text.trunk), _TRUNK_TOKENS)
    return LazyBatches(parts, lambda text: text.trunk, store.ensure)


class Continuations:
    """The clean model's continuations of all prompts except paraphrases.

    Args:
        lm: the clean model.
        cases: the prompts.
    """

    def __init__(self, lm: LM, cases: Iterable[PromptCase]) -> None:
        self.lm = lm
        self.texts: dict[tuple[str, int], str] = {}
        wanted = {self._key(case): case for case in cases if self._continued(case)}
        self._lazy = LazyBatches(by_budget([*wanted.values()], lambda case: case), self._key, self._generate)

    def ensure(self, cases: Sequence[PromptCase]) -> None:
        """Add the continuations to the findings of the cases."""
        continued = [case for case in cases if self._continued(case)]
        self._lazy.ensure(continued)
        for case in continued:
            case.found["text_before"] = self.texts[self._key(case)]

    def _generate(self, part: Sequence[PromptCase]) -> None:
        texts = self.lm.generate([case.prompt for case in part], part[0].budget)
        self.texts |= {self._key(case): text for case, text in zip(part, texts, strict=True)}

    @staticmethod
    def _key(case: PromptCase) -> tuple[str, int]:
        return case.prompt, case.budget

    @staticmethod
    def _continued(case: PromptCase) -> bool:
        return case.kind != "paraphrase" and case.budget > 0


# ------------------------------------------------------------------------------------------ teacher forced


def score_forced(rows: Sequence[Row], edited: EditedModels, store: TrunkCache) -> None:
    """Score every prompt under its edit, teacher forced, and add the scores to the findings.

    Args:
        rows: the prompts.
        edited: the edits.
        store: the trunk outputs of the prompts' texts.
    """
    for part in length_buckets(rows, lambda item: item[1].text.size, FORCED_TOKENS):
        _score_answers(part, edited, store)
    apart = [(row, case) for row, case in rows if case.other_text is not None and not case.one_pass]
    for part in length_buckets(apart, lambda item: _other(item[1]).size, FORCED_TOKENS):
        cases = [case for _, case in part]
        _score_others(cases, *_logits(part, [_other(case) for case in cases], edited, store))


def _score_answers(part: Sequence[Row], edited: EditedModels, store: TrunkCache) -> None:
    cases = [case for _, case in part]
    before, after, labels, owner = _logits(part, [case.text for case in cases], edited, store)
    count, device = len(cases), before.device
    was, now = before.argmax(-1), after.argmax(-1)
    local = torch.tensor([case.local for case in cases], device=device)
    wanted = torch.where(local[owner], was, labels)
    _add(
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
    sharing = [i for i, case in enumerate(cases) if case.one_pass]
    if sharing:
        first = torch.searchsorted(owner, torch.tensor(sharing, device=device))
        token = torch.tensor([_other(cases[i]).labels[0] for i in sharing], device=device)
        alone = torch.arange(len(sharing), device=device)
        _score_others([cases[i] for i in sharing], before[first], after[first], token, alone)


def _score_others(
    cases: Sequence[PromptCase], before: Tensor, after: Tensor, labels: Tensor, owner: Tensor
) -> None:
    count = len(cases)
    columns = {}
    for side, logits in (("before", before), ("after", after)):
        columns[f"other_{side}"] = answer_probability(logits, labels, owner, count)
        columns[f"other_rank_{side}"] = answer_rank(logits, labels, owner, count)
        columns[f"other_nll_{side}"] = mean_nll(logits, labels, owner, count)
    _add(cases, columns)


def _logits(
    part: Sequence[Row], texts: Sequence[Text], edited: EditedModels, store: TrunkCache
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits ``[n, vocabulary]`` of the clean and of the edited model, labels and owners ``[n]``."""
    tokens, before = store.logits(texts)
    after = torch.cat(edited.logits([row for row, _ in part], texts))
    return before, after, tokens.labels.to(before.device), tokens.owner.to(before.device)


def _add(cases: Sequence[PromptCase], columns: dict[str, Tensor]) -> None:
    for name, column in columns.items():
        for case, value in zip(cases, column.tolist(), strict=True):
            case.found[name] = value


def _other(case: PromptCase) -> Text:
    assert case.other_text is not None
    return case.other_text


# ----------------------------------------------------------------------------------------- free generation


def score_generated(rows: Sequence[Row], edited: EditedModels, clean: Continuations) -> None:
    """Continue every prompt under its edit by greedy decoding, and add the text and its scores to the findings.

    Args:
        rows: the prompts; those with a budget of 0 are left out.
        edited: the edits.
        clean: the clean model's continuations.
    """
    wanted = [(row, case) for row, case in rows if case.budget]
    clean.ensure([case for _, case in wanted])
    for part in by_budget(wanted, lambda item: item[1]):
        prompts = [case.prompt for _, case in part]
        texts = edited.generate([row for row, _ in part], prompts, part[0][1].budget)
        for (_, case), text in zip(part, texts, strict=True):
            case.found["text_after"] = text
            if case.local:
                case.found["generated"] = same_answer(case.found["text_before"], text, case.answer)
            else:
                case.found["generated"] = answer_match(text, case.answer)
                case.found["exact"] = full_match(text, case.answer)
