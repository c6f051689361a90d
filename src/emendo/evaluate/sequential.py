"""Edits one after the other, each in the model with all earlier ones, and their retention.

An edit has one fact, or several at once (``together``). Right after its edit every fact is asked once, teacher forced.
After N = 1, 10, 100 and 1,000 edits all facts so far are asked again, with their neighbours, teacher forced and by free
generation. The two are reported apart, since a method may succeed at every edit and lose it with the next. The sum of
the edits is kept as one dense fp32 change of each matrix, beside the weights; an editor that changes no weights makes
one edit of all facts so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.edits import Request, weight_norm
from emendo.errors import RequestError
from emendo.evaluate._prompts import PromptCase, describe_framing, request_of, tokenise
from emendo.evaluate._scoring import Continuations, score_forced, score_generated, trunk_batches
from emendo.evaluate.damage import Damage
from emendo.evaluate.edited_models import EditedModels, existing_change, make_edits
from emendo.evaluate.evaluation import Checkpoint, SequentialEvaluation
from emendo.evaluate.harness import Harness, unmeasured
from emendo.evaluate.results import Result
from emendo.evaluate.run import ResultStore
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress

Gate = Callable[[Request, Mapping[str, LowRank]], bool]
"""Decides whether an edit stays, from its request and its change, while the earlier edits are attached to the model."""

RETENTION = (1, 10, 100, 1000)
"""The numbers of edits after which all facts so far are asked again."""


def evaluate_sequence(
    lm: LM,
    editor: Editor,
    records: Sequence[Record],
    *,
    at: Sequence[int] = RETENTION,
    together: int = 1,
    generated: bool = True,
    damage: Damage | None = None,
    gate: Gate | None = None,
    parts: ResultStore | None = None,
    harness: Harness | None = None,
    progress: Progress = SILENT,
) -> SequentialEvaluation:
    """Make one edit after the other, and ask all facts so far again at checkpoints.

    Args:
        lm: the model; it is unchanged afterwards.
        editor: an editor of any kind.
        records: the facts, in the order of their edits.
        at: the checkpoints, as numbers of edits; there is always one after the last edit.
        together: the number of facts in one edit; the last one before a checkpoint may have fewer.
        generated: score free generation at the checkpoints too.
        damage: measurements away from the records' prompts, at the checkpoints.
        gate: decides whether an edit stays; a refused one is removed, and counts as failed.
        parts: keeps the results; a part that it has is not asked again, though its edits are made again.
        harness: tasks to run on the clean model and on the one with all edits.
        progress: receives how far the work has come.

    Raises:
        RequestError: there are no records, a text does not fit the model's context, or too many facts for the editor.
        MismatchError: the editor was trained for another model.
    """
    if not records:
        raise RequestError("There are no records to evaluate on.")
    if gate is not None and editor.no_changes:
        raise RequestError(f"The guard watches changes of weights, and {editor.no_changes}.")
    if any(count < 1 for count in (*at, together)):
        raise RequestError(f"at={tuple(at)}, together={together}: give whole numbers from 1 up.")
    if gate is not None and together > 1:
        raise RequestError("The guard watches single edits: give no gate, or together=1.")
    editor.check(lm)
    editor.start_over()
    with editor.evaluating(), torch.no_grad():
        if harness is not None and unmeasured(editor, single=False) is None:
            harness.begin(lm)
        run = _Run(lm, editor, records, together, generated, damage, gate, parts, progress)
        found = run.measure(sorted({count for count in at if count < len(records)} | {len(records)}))
        return found if harness is None else replace(found, harness=run.run_harness(harness))


class _Run:
    """One sequential evaluation in progress."""

    def __init__(
        self,
        lm: LM,
        editor: Editor,
        records: Sequence[Record],
        together: int,
        generated: bool,
        damage: Damage | None,
        gate: Gate | None,
        parts: ResultStore | None,
        progress: Progress,
    ) -> None:
        self.lm, self.editor, self.records, self.generated = lm, editor, records, generated
        self.together = together
        self.damage, self.guarded, self.parts, self.progress = damage, gate is not None, parts, progress
        self.store = TrunkCache(Trunk(lm.model, editor.sites or find_sites(lm.model)), dtype=torch.float32)
        if damage is not None:
            damage.begin(lm, self.store, 1)
        self.cases = tokenise(lm, records, None, fact_in_context=False)
        texts = [text for cases in self.cases for case in cases for text in case.texts()]
        self.trunk = trunk_batches(self.store, texts)
        self.clean = Continuations(lm, [case for cases in self.cases for case in cases] if generated else ())
        self.edits = (
            _AllFacts(lm, editor, self.store) if editor.no_changes else _Sum(lm, editor, gate, self.store)
        )

    def measure(self, at: Sequence[int]) -> SequentialEvaluation:
        right_after: list[Result] = []
        points: list[Checkpoint] = []
        done = 0
        for number, count in enumerate(at):
            segment = self.records[done:count]
            found = self._kept(2 * number, segment)
            fresh = [
                result
                for at in range(done, count, self.together)
                for result in self._edit(range(at, min(at + self.together, count)), score=found is None)
            ]
            right_after += found if found is not None else self._keep(2 * number, fresh)
            again = self._kept(2 * number + 1, self.records[:count])
            if again is None:
                again = self._keep(2 * number + 1, self._all(count))
            points.append(Checkpoint(count, tuple(again)))
            done = count
        several = f", each of {self.together} facts" if self.together > 1 else ""
        protocol = {
            "edits": f"one after the other{several}, each in the model with all earlier ones",
            "right_after": "asked right after its own edit, teacher forced; edit prompt and paraphrases",
            "retained": "all facts so far asked again after N edits, with their neighbours and unrelated prompts; "
            "free_generation and *_generated by greedy decoding from the prompt alone, the rest teacher forced",
            "retained_generated": self.generated,
            "model": self.lm.name,
            "fingerprint": self.lm.fingerprint,
            "prompts": describe_framing(self.lm, self.records),
            "editor": self.editor.name,
            "guard": "an edit that it refuses is removed, and counts as failed" if self.guarded else "none",
        }
        clean = self.damage.clean() if self.damage is not None else {}
        return SequentialEvaluation(tuple(right_after), tuple(points), protocol, clean)

    def run_harness(self, harness: Harness) -> dict[str, Any]:
        """Run the harness's tasks with all edits in the model."""
        if (why := unmeasured(self.editor, single=False)) is not None:
            return {"edits": why, "scores": {}}
        edits = f"the clean model, and the one with all {len(self.records):,} edits one after the other"
        edits += ", except those that the guard refused" if self.guarded else ""
        return harness.compare(self.editor.host(self.lm), self.edits.changes(), edits)

    def _kept(self, number: int, records: Sequence[Record]) -> list[Result] | None:
        found = self.parts.read(number, records) if self.parts is not None else None
        return None if found is None else list(found)

    def _keep(self, number: int, results: list[Result]) -> list[Result]:
        if self.parts is not None:
            self.parts.write(number, results)
        return results

    def _edit(self, members: range, *, score: bool) -> list[Result]:
        """Make one more edit, and score its facts."""
        stays = self.edits.add([request_of(self.records[index]) for index in members])
        self.progress.update("edits", members.stop, len(self.records))
        if not score:
            return [Result(self.records[index], (), 0, 0.0) for index in members]
        edited = self.edits.made()
        own = {index: [case for case in self.cases[index] if not case.local] for index in members}
        self._score([case for cases in own.values() for case in cases], edited)
        seen = {"refused": float(not stays)} if self.guarded else {}
        seconds = edited.seconds / len(members)
        return [self._result(index, cases, seen, seconds) for index, cases in own.items()]

    def _all(self, count: int) -> list[Result]:
        """All facts so far, asked again."""
        edited = self.edits.made()
        seen = self.damage.measure(edited, [0])[0] if self.damage is not None else {}
        cases = [case for index in range(count) for case in self.cases[index]]
        self._score(cases, edited)
        if self.generated:
            score_generated([(0, case) for case in cases], edited, self.clean)
        self.progress.update(f"asked again after {count}", count, count)
        return [self._result(index, self.cases[index], seen) for index in range(count)]

    def _score(self, cases: Sequence[PromptCase], edited: EditedModels) -> Sequence[PromptCase]:
        self.trunk.ensure([text for case in cases for text in case.texts()])
        score_forced([(0, case) for case in cases], edited, self.store)
        return cases

    def _result(
        self, index: int, cases: Sequence[PromptCase], seen: Mapping[str, float], seconds: float = 0.0
    ) -> Result:
        norms = self.edits.norms()
        return Result(
            record=self.records[index],
            outcomes=tuple(case.outcome() for case in cases),
            rank=0,
            norm=fmean(norms.values()) if norms else 0.0,
            norms=norms,
            seconds=seconds,
            edit=index,
            damage=seen,
        )


class _Sum:
    """The sum of the edits so far, each made in the model with all earlier ones."""

    def __init__(self, lm: LM, editor: Editor, gate: Gate | None, store: TrunkCache) -> None:
        self.lm, self.editor, self.gate, self.store = lm, editor, gate, store
        self.host = editor.host(lm).model
        self.size = {site.name: weight_norm(site.module(self.host), site.shape) for site in editor.sites}
        self.dense: dict[str, Tensor] = {}
        self.seconds = 0.0

    def add(self, requests: Sequence[Request]) -> bool:
        """Make one more edit; False where the gate refused it."""
        start = time.perf_counter()
        with torch.enable_grad(), applied(self.host, self.changes()):
            if len(requests) == 1:
                changes = {name: change[0] for name, change in self.editor.each(self.lm, requests).items()}
            else:
                changes = self.editor.together(self.lm, requests)
            own = {name: LowRank(c.left.detach(), c.right.detach()) for name, c in changes.items()}
            stays = self.gate is None or self.gate(requests[0], own)
        if stays:
            for name, change in own.items():
                dense = change.dense().float()
                self.dense[name] = self.dense[name] + dense if name in self.dense else dense
            with torch.enable_grad(), applied(self.host, self.changes()):
                self.editor.continue_from(self.lm, requests)
        self.seconds = time.perf_counter() - start
        return stays

    def made(self) -> EditedModels:
        return existing_change(self.lm, self.editor, self.dense, self.seconds, self.store)

    def changes(self) -> dict[str, LowRank]:
        return {name: LowRank.from_dense(change) for name, change in self.dense.items()}

    def norms(self) -> dict[str, float]:
        return {name: float(d.double().norm()) / self.size[name] for name, d in self.dense.items()}


class _AllFacts:
    """One edit of all facts so far, of an editor that changes no weights; made only where it is asked."""

    def __init__(self, lm: LM, editor: Editor, store: TrunkCache) -> None:
        self.lm, self.editor, self.store = lm, editor, store
        self.requests: list[Request] = []

    def add(self, requests: Sequence[Request]) -> bool:
        self.requests += requests
        return True

    def made(self) -> EditedModels:
        return make_edits(self.lm, self.editor, [self.requests], self.store)

    def changes(self) -> dict[str, LowRank]:
        return {}

    def norms(self) -> dict[str, float]:
        return {}
