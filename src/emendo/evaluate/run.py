"""Measure an editor: each edit from the clean model, of one fact or of several, on every prompt of its records.

Edits are made and evaluated in batches (see :mod:`emendo.evaluate.edited_models`): each row of a batch has its own
record's edit, so the figures are those of separate edits. Teacher-forced passes start from cached trunk outputs; free
generation is greedy. What is computed together is fixed by the records alone, so that a run that was stopped and
goes on, or that several processes share, gives the same figures to the last bit.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import fmean, median
from typing import Any, Protocol

import torch

from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate._prompts import EXTRA_TOKENS, TOKEN_STEP, Continuations, Lazy, tokenise, trunk_batches
from emendo.evaluate._scoring import score_forced, score_generated
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

SINGLE_EDITS = 20
"""Edits that are made alone, for their time."""


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
    told: bool = True,
    damage: Damage | None = None,
    parts: Parts | None = None,
    share: tuple[int, int] = (0, 1),
    harness: Harness | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Edit every record's fact into the clean model and score the edited model on the record's prompts.

    Nothing here is random. The model comes back as it was.

    Args:
        lm: the model.
        editor: an editor of any kind, trained where it needs to be.
        records: what to edit and where to look; what does not fill a group of ``together`` is left out.
        limit: take the first so many records.
        generated: see :class:`EvaluateConfig`, as for the next ones.
        batch: how many facts are edited at once.
        new_tokens: how many tokens are generated.
        together: how many facts make one edit.
        told: ask also with the edited fact before the prompt.
        damage: what to look at beside the records' own prompts.
        parts: where the results are kept on the way; what it holds already is not measured again.
        share: which part of the work this process does, and of how many; the results are those of this part alone.
        harness: tasks to ask of the clean model and of the one with the first edit of several facts.
        progress: receives how far the work has come.

    Raises:
        RequestError: there are no records, or a text does not fit the model's context.
        MismatchError: the editor was trained for another model.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit={limit}: give a whole number from 1 up.")
    ways = EvaluateConfig(generated, batch, new_tokens, together, told, share)
    chosen = tuple(islice(records, limit))
    chosen = chosen[: len(chosen) // together * together]
    if not chosen:
        few = "There are no records to evaluate on."
        raise RequestError(
            few if together == 1 else f"There are fewer records than the {together} of one edit."
        )
    editor.check(lm)
    training = editor.training
    editor.eval()
    try:
        with torch.no_grad():
            run = _Run(lm, editor, chosen, ways, damage, progress)
            asks = harness if harness is not None and unmeasured(editor, together == 1) is None else None
            if asks is not None:
                asks.begin(lm)
            results = run.measure(parts)
            return Evaluation(
                results=results,
                protocol=words(lm, editor, ways, damage),
                seconds_per_edit=run.seconds_alone(),
                seconds_per_edit_in_batch=fmean(r.seconds for r in results) if results else 0.0,
                clean=damage.clean() if damage is not None else {},
                cost=cost(lm, editor),
                harness=run.ask_harness(harness) if harness is not None else {},
            )
    finally:
        editor.train(training)


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        lm: LM,
        editor: Editor,
        records: Sequence[Record],
        ways: EvaluateConfig,
        damage: Damage | None,
        progress: Progress,
    ) -> None:
        self.lm, self.editor, self.records, self.ways = lm, editor, records, ways
        self.progress, self.damage = progress, damage
        trunk = Trunk(lm.model, editor.sites or find_sites(lm.model))
        self.store = TrunkCache(trunk, dtype=torch.float32)
        if damage is not None:
            damage.begin(lm, self.store, len(records) // ways.together)
        self.cases = tokenise(lm, records, ways.new_tokens, told=ways.told)
        cases = [case for cases in self.cases for case in cases]
        self.trunk: Lazy = trunk_batches(self.store, [text for case in cases for text in case.texts()])
        self.clean = Continuations(lm, cases if ways.generated else ())
        host = editor.host(lm).model
        self.size = {
            site.name: float(torch.linalg.vector_norm(site.weight(host), dtype=torch.float64))
            for site in editor.sites
        }

    def measure(self, parts: Parts | None) -> tuple[Result, ...]:
        """The results of this process's share, in the records' order."""
        rank, world = self.ways.share
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

    def ask_harness(self, harness: Harness) -> dict[str, Any]:
        """What the harness's tasks give under the first edit of several facts."""
        if (why := unmeasured(self.editor, self.ways.together == 1)) is not None:
            return {"edits": why, "scores": {}}
        changes = self._made([0]).deltas
        assert changes is not None
        first = {name: change[0] for name, change in changes.items()}
        words = f"the clean model, and the one with the first edit, of {self.ways.together} facts at once"
        return harness.compare(self.editor.host(self.lm), first, words)

    @property
    def _groups(self) -> int:
        return len(self.records) // self.ways.together

    def _members(self, group: int) -> range:
        return range(group * self.ways.together, (group + 1) * self.ways.together)

    def _chunks(self) -> Iterator[list[int]]:
        """Groups of facts whose edits are made at once, alike lengths together: less padding."""
        sizes = [
            max(case.text.size for index in self._members(group) for case in self.cases[index])
            for group in range(self._groups)
        ]
        order = sorted(range(self._groups), key=sizes.__getitem__)
        at_once = max(1, self.ways.batch // self.ways.together)
        yield from (order[at : at + at_once] for at in range(0, len(order), at_once))

    def _made(self, groups: Sequence[int]) -> EditedModels:
        wishes = [
            [
                Request(self.records[index].prompt, self.records[index].target)
                for index in self._members(group)
            ]
            for group in groups
        ]
        return make_edits(self.lm, self.editor, wishes, self.store)

    def _measured(self, groups: Sequence[int]) -> Iterator[Result]:
        asked = self._made(groups)
        rows = [
            [(row, case) for index in self._members(group) for case in self.cases[index]]
            for row, group in enumerate(groups)
        ]
        self.trunk.ensure([text for part in rows for _, case in part for text in case.texts()])
        for part in [list(chain(*rows))] if asked.shared else rows:
            score_forced(part, asked, self.store)
            if self.ways.generated:
                score_generated(part, asked, self.clean)
        seen = self.damage.look(asked, groups) if self.damage is not None else [{} for _ in groups]
        yield from self._results(groups, asked, seen)

    def _results(
        self, groups: Sequence[int], asked: EditedModels, seen: Sequence[Mapping[str, float]]
    ) -> Iterator[Result]:
        deltas = asked.deltas or {}
        norms = {name: (delta.norm() / self.size[name]).tolist() for name, delta in deltas.items()}
        ranks = {
            name: (delta.left.ne(0).any(-2) & delta.right.ne(0).any(-1)).sum(-1).tolist()
            for name, delta in deltas.items()
        }
        facts = len(groups) * self.ways.together
        for row, group in enumerate(groups):
            own = {name: norm[row] for name, norm in norms.items()}
            edit = Result(
                record=self.records[0],
                outcomes=(),
                rank=max((rank[row] for rank in ranks.values()), default=0),
                norm=fmean(own.values()) if own else 0.0,
                norms=own,
                seconds=asked.seconds / facts,
                edit=group,
                damage=seen[row],
            )
            for index in self._members(group):
                outcomes = tuple(case.outcome() for case in self.cases[index])
                yield replace(edit, record=self.records[index], outcomes=outcomes)


# --------------------
# How an evaluation was done, in words and numbers, and what an editor costs.


def words(lm: LM, editor: Editor, ways: EvaluateConfig, damage: Damage | None) -> Mapping[str, Any]:
    """How it was measured; what each score is stands in :mod:`emendo.evaluate.scores`."""
    one = ways.together == 1
    found = {
        "edits": "one at a time, each from the clean model"
        if one
        else f"{ways.together} facts at once, each edit from the clean model",
        "edit_success": "all target tokens are the argmax, teacher forced, on the edit prompt",
        "generalisation": "the same on each paraphrase; mean over a record's paraphrases",
        "locality": "the argmax is unchanged at all answer tokens, teacher forced on the stored answer; mean over a "
        "record's neighbours and unrelated prompts",
        "locality_known": "locality over the prompts whose stored answer the clean model predicts",
        "interval": "95% percentile bootstrap over the records; where all have the same share, the Wilson interval",
        "seconds_per_edit": "median of up to 20 edits made alone",
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "prompts": lm.framing.words,
        "editor": editor.name,
        "batch": ways.batch,
        "together": ways.together,
    }
    if ways.generated:
        found |= {
            "generation": "greedy, from the prompt alone",
            "generated_edit_success": "the continuation begins with the target, as whole words, case and quotes aside",
            "generated_locality": "the continuation begins with the same words before and after, as many as the stored "
            "answer has",
            "generated_locality_whole_text": "the continuation is the same text before and after, letter by letter, up "
            "to its first line break",
            "new_tokens": ways.new_tokens
            or f"answer tokens + {EXTRA_TOKENS}, rounded up to a multiple of {TOKEN_STEP}",
        }
    return found | (damage.words() if damage is not None else {})


def cost(lm: LM, editor: Editor) -> dict[str, float]:
    """The size of the editor, and the most memory that was in use.

    ``peak_memory_bytes`` is that of the whole process on a CPU, model and Python included, since it began; on a CUDA
    device what was allocated there.
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


# --------------------
# How an evaluation is done: what is asked, in which parts, and who hears of it.


class Parts(Protocol):
    """Where the results of a run are kept, part by part."""

    def read(self, number: int, records: Sequence[Record]) -> tuple[Result, ...] | None:
        """The results of a part; None where it has not been written."""

    def write(self, number: int, results: Sequence[Result]) -> None:
        """Keep the results of a part."""


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """How an evaluation is done.

    Attributes:
        generated: score free greedy generation too.
        batch: how many facts are edited at once, each for itself.
        new_tokens: how many tokens are generated; by default the answer's tokens and 4 more, rounded up to a multiple
            of 8, for each prompt, so that no figure depends on what else is in the batch.
        together: how many facts make one edit.
        told: ask the prompts where nothing shall change also with the edited fact before them.
        share: which part of the work this process does, and of how many.

    Raises:
        RequestError: a number that makes no sense.
    """

    generated: bool = True
    batch: int = 25
    new_tokens: int | None = None
    together: int = 1
    told: bool = True
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "together"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"{name}={value}: give a whole number from 1 up.")
