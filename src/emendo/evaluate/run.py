"""Measure an editor: one edit at a time, each from the clean model, on every prompt of its record.

The edits are made and asked in batches (see :mod:`emendo.evaluate.asking`): every row of a batch stands under its own
record's edit, so the figures are those of separate edits. Teacher-forced passes start from the trunk's kept outputs;
free generation is greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from statistics import fmean, median
from typing import Any

import torch

from emendo.data.schema import Record
from emendo.edit import Request
from emendo.editors.base import Editor
from emendo.errors import RequestError
from emendo.evaluate.asking import FORCED_TOKENS, Asked, made
from emendo.evaluate.cases import EXTRA_TOKENS, TOKEN_STEP, Case, by_budget, tokenise
from emendo.evaluate.metrics import all_match, answer_match, answer_probability, same_answer, token_match
from emendo.evaluate.results import Evaluation, Result
from emendo.losses import per_example, token_kl
from emendo.models import LM
from emendo.sites import find_sites
from emendo.store import TrunkStore
from emendo.texts import length_buckets
from emendo.trunk import Trunk

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_SINGLE_EDITS = 20


def evaluate(
    lm: LM,
    editor: Editor,
    records: Iterable[Record],
    *,
    limit: int | None = None,
    generated: bool = True,
    batch: int = 25,
    new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Edit every record's fact into the clean model and score the edited model on the record's prompts.

    Nothing here is random. The model comes back as it was.

    Args:
        lm: the model.
        editor: an editor of any kind, trained where it needs to be.
        records: what to edit and where to look.
        limit: take the first so many records.
        generated: score free greedy generation too.
        batch: how many separate edits are made at once.
        new_tokens: how many tokens are generated; by default the answer's tokens and 4 more, rounded up to a
            multiple of 8, for each prompt, so that no figure depends on what else is in the batch.
        progress: told how far the work has come.

    Raises:
        RequestError: there are no records, or a text does not fit the model's context.
        MismatchError: the editor was trained for another model.
    """
    for name, value in (("limit", limit), ("batch", batch), ("new_tokens", new_tokens)):
        if value is not None and value < 1:
            raise RequestError(f"{name}={value}: give a whole number from 1 up.")
    chosen = tuple(islice(records, limit))
    if not chosen:
        raise RequestError("There are no records to evaluate on.")
    editor.check(lm)
    training = editor.training
    editor.eval()
    try:
        with torch.no_grad():
            run = _Run(lm, editor, chosen, progress or (lambda what, done, total: None), new_tokens)
            results, seconds = run.measure(batch, generated)
            return Evaluation(
                results=results,
                protocol=_protocol(lm, editor, batch, generated, new_tokens),
                seconds_per_edit=run.seconds_alone(),
                seconds_per_edit_in_batch=seconds,
            )
    finally:
        editor.train(training)


class _Run:
    """One evaluation under way."""

    def __init__(
        self, lm: LM, editor: Editor, records: Sequence[Record], progress: Progress, new_tokens: int | None
    ) -> None:
        self.lm, self.editor, self.records, self.progress = lm, editor, records, progress
        trunk = Trunk(lm.model, editor.sites or find_sites(lm.model))
        self.store = TrunkStore(trunk, dtype=torch.float32)
        self.cases = tokenise(lm, records, new_tokens)
        host = editor.host(lm).model
        self.size = {
            site.name: float(torch.linalg.vector_norm(site.weight(host), dtype=torch.float64))
            for site in editor.sites
        }

    def measure(self, batch: int, generated: bool) -> tuple[tuple[Result, ...], float]:
        """The results in the records' order, and the seconds an edit took in its batch."""
        self._read()
        if generated:
            self._continue_clean()
        size = [max(case.text.size for case in cases) for cases in self.cases]
        order = sorted(range(len(self.records)), key=size.__getitem__)  # alike lengths together: less padding
        results: dict[int, Result] = {}
        seconds = 0.0
        for at in range(0, len(order), batch):
            chunk = order[at : at + batch]
            asked = self._made(chunk)
            seconds += asked.seconds
            apart = [[(row, case) for case in self.cases[index]] for row, index in enumerate(chunk)]
            for rows in [list(chain(*apart))] if asked.shared else apart:
                for part in length_buckets(rows, lambda item: item[1].text.size, FORCED_TOKENS):
                    self._force(part, asked)
                if generated:
                    self._generate(rows, asked)
            results.update(zip(chunk, self._results(chunk, asked), strict=True))
            self.progress("edits", len(results), len(order))
        return tuple(results[index] for index in range(len(order))), seconds / len(order)

    def seconds_alone(self) -> float:
        """Median time of single edits."""
        return median(self._made([index]).seconds for index in range(min(_SINGLE_EDITS, len(self.records))))

    def _made(self, chunk: Sequence[int]) -> Asked:
        groups = [[Request(self.records[index].prompt, self.records[index].target)] for index in chunk]
        return made(self.lm, self.editor, groups, self.store)

    def _read(self) -> None:
        """Run the trunk, once for each text."""
        texts = [case.text for cases in self.cases for case in cases]
        total, done = len(self.store.missing(texts)), 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            self.progress("texts", done, total)

        self.store.ensure(texts, tell)

    def _continue_clean(self) -> None:
        """The clean model's continuations of the edit and locality prompts, once for each prompt."""
        cases = [case for cases in self.cases for case in cases if case.kind != "paraphrase"]
        same: dict[tuple[str, int], list[Case]] = {}
        for case in cases:
            same.setdefault((case.prompt, case.budget), []).append(case)
        done = 0
        for part in by_budget([group[0] for group in same.values()], lambda case: case):
            texts = self.lm.generate([case.prompt for case in part], part[0].budget)
            for case, text in zip(part, texts, strict=True):
                for twin in same[case.prompt, case.budget]:
                    twin.found["text_before"] = text
            done += len(part)
            self.progress("clean continuations", done, len(same))

    def _force(self, part: Sequence[tuple[int, Case]], asked: Asked) -> None:
        """Teacher-forced passes of the clean and of the edited model; each row under its own record's edit."""
        texts, count = [case.text for _, case in part], len(part)
        tokens, before = self.store.logits(texts)
        after = torch.cat(asked.logits([row for row, _ in part], texts))
        labels, owner = tokens.labels.to(before.device), tokens.owner.to(before.device)
        was, now = before.argmax(-1), after.argmax(-1)
        local = torch.tensor([case.local for _, case in part], device=owner.device)
        wanted = torch.where(local[owner], was, labels)
        columns = {
            "teacher_forced": all_match(now, wanted, owner, count),
            "token_level": token_match(now, wanted, owner, count),
            "known": all_match(was, labels, owner, count),
            "before": answer_probability(before, labels, owner, count),
            "after": answer_probability(after, labels, owner, count),
            "kl": per_example(token_kl(before, after), owner, count).clamp(min=0),
        }
        for name, column in columns.items():
            for (_, case), value in zip(part, column.tolist(), strict=True):
                case.found[name] = value

    def _generate(self, rows: Sequence[tuple[int, Case]], asked: Asked) -> None:
        """Free greedy continuations; each row under its own record's edit."""
        for part in by_budget(rows, lambda item: item[1]):
            prompts = [case.prompt for _, case in part]
            texts = asked.generate([row for row, _ in part], prompts, part[0][1].budget)
            for (_, case), text in zip(part, texts, strict=True):
                case.found["text_after"] = text
                if case.local:
                    case.found["generated"] = same_answer(case.found["text_before"], text, case.answer)
                else:
                    case.found["generated"] = answer_match(text, case.answer)

    def _results(self, chunk: Sequence[int], asked: Asked) -> Iterator[Result]:
        deltas = asked.deltas or {}
        norms = {name: (delta.norm() / self.size[name]).tolist() for name, delta in deltas.items()}
        ranks = {
            name: (delta.left.ne(0).any(-2) & delta.right.ne(0).any(-1)).sum(-1).tolist()
            for name, delta in deltas.items()
        }
        for row, index in enumerate(chunk):
            yield Result(
                record=self.records[index],
                outcomes=tuple(case.outcome() for case in self.cases[index]),
                rank=max((rank[row] for rank in ranks.values()), default=0),
                norm=fmean(norm[row] for norm in norms.values()) if norms else 0.0,
            )


def _protocol(
    lm: LM, editor: Editor, batch: int, generated: bool, new_tokens: int | None
) -> Mapping[str, Any]:
    """How it was measured, in words and numbers."""
    words = {
        "edits": "one at a time, each from the clean model",
        "edit_success": "all target tokens are the argmax, teacher forced, on the edit prompt",
        "generalisation": "the same on each paraphrase; mean over a record's paraphrases",
        "locality": "the argmax is unchanged at all answer tokens, teacher forced on the stored answer; mean over a "
        "record's neighbours and unrelated prompts",
        "locality_known": "locality over the prompts whose stored answer the clean model predicts",
        "interval": "95% Wilson score interval over the records",
        "seconds_per_edit": f"median of up to {_SINGLE_EDITS} edits made alone",
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "editor": editor.name,
        "batch": batch,
    }
    if generated:
        words |= {
            "generation": "greedy, from the prompt alone",
            "generated_edit_success": "the continuation begins with the target, as whole words, case and quotes aside",
            "generated_locality": "the continuation begins with the same words before and after, as many as the stored "
            "answer has",
            "generated_locality_whole_text": "the continuation is the same text before and after, letter by letter, up "
            "to its first line break",
            "new_tokens": new_tokens
            or f"answer tokens + {EXTRA_TOKENS}, rounded up to a multiple of {TOKEN_STEP}",
        }
    return words
