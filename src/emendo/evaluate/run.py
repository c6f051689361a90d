"""Measure an editor: each edit from the clean model, of one fact or of several, on every prompt of its records.

Edits are made and scored in batches (see :mod:`emendo.evaluate.edited_models`): each row of a batch has its own
record's edit, so the figures are those of separate edits. Teacher-forced passes start from cached trunk outputs; free
generation is greedy. The batches depend on the records alone, so that a run that is resumed, or shared by several
processes, gives the same figures to the last bit.
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import fmean, median
from typing import Any, Protocol

import torch

from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.edits import weight_norm
from emendo.errors import RequestError
from emendo.evaluate._prompts import EXTRA_TOKENS, TOKEN_STEP, describe_framing, request_of, tokenise
from emendo.evaluate._scoring import Continuations, Row, score_forced, score_generated, trunk_batches
from emendo.evaluate.damage import Damage
from emendo.evaluate.edited_models import EditedModels, make_edits
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.harness import Harness, unmeasured
from emendo.evaluate.results import Result
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress

SINGLE_EDITS = 5
"""The number of edits that are made alone to be timed."""


class ResultStore(Protocol):
    """Keeps the results of a run, part by part, so that it can be resumed."""

    def read(self, number: int, records: Sequence[Record]) -> tuple[Result, ...] | None:
        """The results of a part; None where it has not been written."""

    def write(self, number: int, results: Sequence[Result]) -> None:
        """Keep the results of a part."""


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """How an evaluation is done.

    Attributes:
        generated: score free greedy generation too.
        batch: the number of facts whose edits are made and scored at once.
        new_tokens: the number of tokens to generate; by default for each prompt the answer's tokens and 4 more, rounded
            up to a multiple of 8, so that no figure depends on the rest of the batch.
        together: the number of facts in one edit.
        fact_in_context: ask the neighbours also with the edited fact before them.
        share: the part of the work that this process does, and the number of parts.

    Raises:
        RequestError: a number below 1.
    """

    generated: bool = True
    batch: int = 25
    new_tokens: int | None = None
    together: int = 1
    fact_in_context: bool = True
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "together"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"{name}={value}: give a whole number from 1 up.")


def evaluate(
    lm: LM,
    editor: Editor,
    records: Iterable[Record],
    *,
    limit: int | None = None,
    generated: bool = True,
    batch: int = 25,
    new_tokens: int | None = None,
    together: int = 1,
    fact_in_context: bool = True,
    told: bool | None = None,
    damage: Damage | None = None,
    parts: ResultStore | None = None,
    share: tuple[int, int] = (0, 1),
    harness: Harness | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Edit every record's fact into the clean model and score the edited model on the record's prompts.

    Nothing here is random. The model is unchanged afterwards.

    Args:
        lm: the model.
        editor: an editor of any kind, trained if it needs training.
        records: the facts to edit, with their prompts; a last group of fewer than ``together`` is left out.
        limit: use the first records only.
        generated: see :class:`EvaluateConfig`, as for ``batch``, ``new_tokens``, ``together``, ``fact_in_context`` and
            ``share``.
        batch: the number of facts at once.
        new_tokens: the number of tokens to generate.
        together: the number of facts in one edit.
        fact_in_context: ask the neighbours also with the edited fact before them.
        told: the deprecated name of ``fact_in_context``.
        damage: measurements away from the records' prompts.
        parts: keeps the results; a part that it has is not measured again.
        share: the part of the work that this process does; the results are those of this part alone.
        harness: tasks to run on the clean model and on the one with the first edit of several facts.
        progress: receives how far the work has come.

    Raises:
        RequestError: there are no records, or a text does not fit the model's context.
        MismatchError: the editor was trained for another model.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit={limit}: give a whole number from 1 up.")
    if told is not None:
        warnings.warn("told= is deprecated; use fact_in_context=", DeprecationWarning, stacklevel=2)
        fact_in_context = told
    config = EvaluateConfig(generated, batch, new_tokens, together, fact_in_context, share)
    chosen = tuple(islice(records, limit))
    chosen = chosen[: len(chosen) // together * together]
    if not chosen:
        few = "There are no records to evaluate on."
        raise RequestError(
            few if together == 1 else f"There are fewer records than the {together} of one edit."
        )
    editor.check(lm)
    with editor.evaluating(), torch.no_grad():
        run = Run(lm, editor, chosen, config, damage, progress)
        if harness is not None and unmeasured(editor, together == 1) is None:
            harness.begin(lm)
        results = run.measure(parts)
        return Evaluation(
            results=results,
            protocol=describe(lm, editor, config, damage, describe_framing(lm, chosen)),
            seconds_per_edit=run.seconds_alone(),
            seconds_per_edit_in_batch=fmean(r.seconds for r in results) if results else 0.0,
            clean=damage.clean() if damage is not None else {},
            cost=cost(lm, editor),
            harness=run.run_harness(harness) if harness is not None else {},
        )


class Run:
    """One evaluation in progress.

    A subclass may put prompts under other edits than their own (:meth:`edits_for`).
    """

    def __init__(
        self,
        lm: LM,
        editor: Editor,
        records: Sequence[Record],
        config: EvaluateConfig,
        damage: Damage | None,
        progress: Progress,
    ) -> None:
        self.lm, self.editor, self.records, self.config = lm, editor, records, config
        self.progress, self.damage = progress, damage
        trunk = Trunk(lm.model, editor.sites or find_sites(lm.model))
        self.store = TrunkCache(trunk, dtype=torch.float32)
        if damage is not None:
            damage.begin(lm, self.store, len(records) // config.together)
        self.cases = tokenise(lm, records, config.new_tokens, fact_in_context=config.fact_in_context)
        cases = [case for cases in self.cases for case in cases]
        self.trunk = trunk_batches(self.store, [text for case in cases for text in case.texts()])
        self.clean = Continuations(lm, cases if config.generated else ())
        host = editor.host(lm).model
        self.size = {site.name: weight_norm(site.module(host), site.shape) for site in editor.sites}

    def measure(self, parts: ResultStore | None) -> tuple[Result, ...]:
        """The results of this process's share, in the records' order."""
        rank, world = self.config.share
        chunks = [*enumerate(self._chunks())][rank::world]
        total = sum(len(groups) for _, groups in chunks)
        results: dict[int, Result] = {}
        done = 0
        for number, groups in chunks:
            indices = [index for group in groups for index in self._members(group)]
            records = [self.records[index] for index in indices]
            found = parts.read(number, records) if parts is not None else None
            if found is None:
                found = tuple(self._measured(groups))
                if parts is not None:
                    parts.write(number, found)
            results.update(zip(indices, found, strict=True))
            done += len(groups)
            self.progress.update("edits", done, total)
        return tuple(results[index] for index in sorted(results))

    def seconds_alone(self) -> float:
        """Median time of single edits."""
        return median(self._made([group]).seconds for group in range(min(SINGLE_EDITS, self._groups)))

    def run_harness(self, harness: Harness) -> dict[str, Any]:
        """Run the harness's tasks under the first edit of several facts."""
        if (why := unmeasured(self.editor, self.config.together == 1)) is not None:
            return {"edits": why, "scores": {}}
        changes = self._made([0]).deltas
        assert changes is not None
        first = {name: change[0] for name, change in changes.items()}
        edits = f"the clean model, and the one with the first edit, of {self.config.together} facts at once"
        return harness.compare(self.editor.host(self.lm), first, edits)

    @property
    def _groups(self) -> int:
        return len(self.records) // self.config.together

    def _members(self, group: int) -> range:
        return range(group * self.config.together, (group + 1) * self.config.together)

    def _chunks(self) -> Iterator[list[int]]:
        """Groups of facts whose edits are made at once; similar lengths go together, for less padding."""
        sizes = [
            max(case.text.size for index in self._members(group) for case in self.cases[index])
            for group in range(self._groups)
        ]
        order = sorted(range(self._groups), key=sizes.__getitem__)
        at_once = max(1, self.config.batch // self.config.together)
        yield from (order[at : at + at_once] for at in range(0, len(order), at_once))

    def _made(self, groups: Sequence[int]) -> EditedModels:
        requests = [[request_of(self.records[index]) for index in self._members(group)] for group in groups]
        return make_edits(self.lm, self.editor, requests, self.store)

    def edits_for(self, groups: Sequence[int]) -> tuple[EditedModels, list[list[Row]]]:
        """The edits of some groups, and for each group its prompts with the row of the edit that each stands under.

        The first rows are the edits of the groups, in their order.
        """
        rows = [
            [(row, case) for index in self._members(group) for case in self.cases[index]]
            for row, group in enumerate(groups)
        ]
        return self._made(groups), rows

    def _measured(self, groups: Sequence[int]) -> Iterator[Result]:
        edited, rows = self.edits_for(groups)
        self.trunk.ensure([text for part in rows for _, case in part for text in case.texts()])
        for part in [list(chain(*rows))] if edited.shared else rows:
            score_forced(part, edited, self.store)
            if self.config.generated:
                score_generated(part, edited, self.clean)
        seen = self.damage.measure(edited, groups) if self.damage is not None else [{} for _ in groups]
        yield from self._results(groups, edited, seen)

    def _results(
        self, groups: Sequence[int], edited: EditedModels, seen: Sequence[Mapping[str, float]]
    ) -> Iterator[Result]:
        deltas = edited.deltas or {}
        norms = {name: (delta.norm() / self.size[name]).tolist() for name, delta in deltas.items()}
        ranks = {
            name: (delta.left.ne(0).any(-2) & delta.right.ne(0).any(-1)).sum(-1).tolist()
            for name, delta in deltas.items()
        }
        facts = len(groups) * self.config.together
        for row, group in enumerate(groups):
            own = {name: norm[row] for name, norm in norms.items()}
            edit = Result(
                record=self.records[0],
                outcomes=(),
                rank=max((rank[row] for rank in ranks.values()), default=0),
                norm=fmean(own.values()) if own else 0.0,
                norms=own,
                seconds=edited.seconds / facts,
                edit=group,
                damage=seen[row],
            )
            for index in self._members(group):
                outcomes = tuple(case.outcome() for case in self.cases[index])
                yield replace(edit, record=self.records[index], outcomes=outcomes)


def describe(
    lm: LM, editor: Editor, config: EvaluateConfig, damage: Damage | None, prompts: str
) -> Mapping[str, Any]:
    """How it was measured, as JSON values; :mod:`emendo.evaluate.scores` defines each score."""
    one = config.together == 1
    found = {
        "edits": "one at a time, each from the clean model"
        if one
        else f"{config.together} facts at once, each edit from the clean model",
        "edit_success": "all target tokens are the argmax, teacher forced, on the edit prompt",
        "generalisation": "the same on each paraphrase; mean over a record's paraphrases",
        "locality": "the argmax is unchanged at all answer tokens, teacher forced on the stored answer; mean over a "
        "record's neighbours and unrelated prompts",
        "locality_known": "locality over the prompts whose stored answer the clean model predicts",
        "interval": "95% percentile bootstrap over the records; Wilson where all have the same share",
        "seconds_per_edit": f"median of up to {SINGLE_EDITS} edits made alone",
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "prompts": prompts,
        "editor": editor.name,
        "batch": config.batch,
        "together": config.together,
    }
    if config.generated:
        found |= {
            "generation": "greedy, from the prompt alone",
            "generated_edit_success": "the continuation begins with the target, as whole words, case and quotes aside",
            "generated_locality": "the continuation begins with the same words before and after, as many as the stored "
            "answer has",
            "generated_locality_whole_text": "the continuation is the same text before and after, letter by letter, up "
            "to its first line break",
            "new_tokens": config.new_tokens
            or f"answer tokens + {EXTRA_TOKENS}, rounded up to a multiple of {TOKEN_STEP}",
        }
    return found | (damage.describe() if damage is not None else {})


def cost(lm: LM, editor: Editor) -> dict[str, float]:
    """The size of the editor, and the peak memory.

    ``peak_memory_bytes`` is that of the whole process since it started, model and Python included, or on a CUDA device
    the memory allocated there.
    """
    tensors = [*editor.parameters(), *editor.buffers()]
    if lm.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(lm.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "editor_parameters": sum(p.numel() for p in editor.parameters()),
        "editor_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "peak_memory_bytes": peak,
    }
