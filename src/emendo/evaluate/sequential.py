"""Edits one after the other, each into the model that the earlier ones have left, and what becomes of them.

Right after its edit every fact is asked once, teacher forced. After N = 1, 10, 100, 1,000 edits all facts so far are
asked again, with their neighbours, teacher forced and by free generation, which is retention: the two are told apart,
for a method may place every edit and lose it with the next. What several edits add up to is kept as one dense change
for each site, in fp32 beside the weights; an editor that changes no weights is given all facts so far at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.edits.edit import BaseEdit, Request
from emendo.errors import RequestError
from emendo.evaluate._prompts import Case, Continuations, tokenise, trunk_batches
from emendo.evaluate._scoring import score_forced, score_generated
from emendo.evaluate.damage import Damage
from emendo.evaluate.edited_models import EditedModels, existing_edit
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.harness import Harness, unmeasured
from emendo.evaluate.results import Result, finite, plain
from emendo.evaluate.run import Parts
from emendo.evaluate.scores import figures
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress

Gate = Callable[[Request, Mapping[str, LowRank]], bool]
"""Given what an edit was asked for and its change, while the earlier ones are attached to the model: whether it may
stay."""

RETENTION = (1, 10, 100, 1000)
"""After how many edits all facts so far are asked again."""


def sequence(
    lm: LM,
    editor: Editor,
    records: Sequence[Record],
    *,
    at: Sequence[int] = RETENTION,
    generated: bool = True,
    damage: Damage | None = None,
    gate: Gate | None = None,
    parts: Parts | None = None,
    harness: Harness | None = None,
    progress: Progress = SILENT,
) -> Sequential:
    """Make one edit after the other, and ask for the earlier ones again now and then.

    Args:
        lm: the model; it comes back as it was.
        editor: an editor of any kind.
        records: what to edit, in this order.
        at: after how many edits to ask for all so far; after the last one they are always asked.
        generated: let the edited model also speak freely when all so far are asked again.
        damage: what to look at beside, at the same times.
        gate: what lets an edit stay; one that it refuses is taken off, and asked for all the same.
        parts: where the results are kept on the way; what is there is not asked again, though its edits are made again.
        harness: tasks to ask of the clean model and of the one with all edits.
        progress: receives how far the work has come.

    Raises:
        RequestError: there are no records, a text does not fit the model's context, or too many facts for the editor.
        MismatchError: the editor was trained for another model.
    """
    if not records:
        raise RequestError("There are no records to evaluate on.")
    if gate is not None and not editor.changes_weights:
        raise RequestError(f"The guard watches changes of weights, and {editor.name} makes none.")
    if any(count < 1 for count in at):
        raise RequestError(f"at={tuple(at)}: give whole numbers from 1 up.")
    editor.check(lm)
    training = editor.training
    editor.eval()
    try:
        with torch.no_grad():
            if harness is not None and unmeasured(editor, single=False) is None:
                harness.begin(lm)
            run = _Run(lm, editor, records, generated, damage, gate, parts, progress)
            found = run.measure(sorted({count for count in at if count < len(records)} | {len(records)}))
            return found if harness is None else replace(found, harness=run.ask_harness(harness))
    finally:
        editor.train(training)


class _Run:
    """One sequential evaluation under way."""

    def __init__(
        self,
        lm: LM,
        editor: Editor,
        records: Sequence[Record],
        generated: bool,
        damage: Damage | None,
        gate: Gate | None,
        parts: Parts | None,
        progress: Progress,
    ) -> None:
        self.lm, self.editor, self.records, self.generated = lm, editor, records, generated
        self.damage, self.gate, self.parts, self.progress = damage, gate, parts, progress
        self.store = TrunkCache(Trunk(lm.model, editor.sites or find_sites(lm.model)), dtype=torch.float32)
        if damage is not None:
            damage.begin(lm, self.store, 1)
        self.cases = tokenise(lm, records, None, told=False)
        texts = [text for cases in self.cases for case in cases for text in case.texts()]
        self.trunk = trunk_batches(self.store, texts)
        self.clean = Continuations(lm, [case for cases in self.cases for case in cases] if generated else ())
        self.state: dict[str, Tensor] | BaseEdit = {}
        host = editor.host(lm).model
        self.size = {site.name: float(site.weight(host).double().norm()) for site in editor.sites}

    def measure(self, at: Sequence[int]) -> Sequential:
        right_after: list[Result] = []
        points: list[Checkpoint] = []
        done = 0
        for number, count in enumerate(at):
            segment = self.records[done:count]
            found = self._kept(2 * number, segment)
            fresh = [self._edit(index, ask=found is None) for index in range(done, count)]
            right_after += found if found is not None else self._keep(2 * number, fresh)
            again = self._kept(2 * number + 1, self.records[:count])
            if again is None:
                again = self._keep(2 * number + 1, self._all(count))
            points.append(Checkpoint(count, tuple(again)))
            done = count
        words = {
            "edits": "one after the other, each into the model that the earlier ones have left",
            "right_after": "asked right after its own edit, teacher forced; edit prompt and rewordings",
            "retained": "all facts so far asked again after N edits, with their neighbours and unrelated prompts; "
            "free_generation and *_generated by greedy decoding from the prompt alone, the rest teacher forced",
            "retained_generated": self.generated,
            "model": self.lm.name,
            "fingerprint": self.lm.fingerprint,
            "prompts": self.lm.framing.words,
            "editor": self.editor.name,
            "guard": "none"
            if self.gate is None
            else "an edit that it refuses is taken off, and counts as failed",
        }
        clean = self.damage.clean() if self.damage is not None else {}
        return Sequential(tuple(right_after), tuple(points), words, clean)

    def ask_harness(self, harness: Harness) -> dict[str, Any]:
        """What the harness's tasks give with all edits in the model."""
        if (why := unmeasured(self.editor, single=False)) is not None:
            return {"edits": why, "scores": {}}
        words = f"the clean model, and the one with all {len(self.records):,} edits one after the other"
        words += "" if self.gate is None else ", without those that the guard refused"
        return harness.compare(self.editor.host(self.lm), self._changes(), words)

    def _changes(self) -> dict[str, LowRank]:
        """All that the edits so far add up to."""
        assert isinstance(self.state, dict)
        return {name: LowRank.from_dense(change) for name, change in self.state.items()}

    def _kept(self, number: int, records: Sequence[Record]) -> list[Result] | None:
        found = self.parts.read(number, records) if self.parts is not None else None
        return None if found is None else list(found)

    def _keep(self, number: int, results: list[Result]) -> list[Result]:
        if self.parts is not None:
            self.parts.write(number, results)
        return results

    def _edit(self, index: int, *, ask: bool) -> Result:
        """Put one more fact into the state, and ask for it."""
        start = time.perf_counter()
        seen: dict[str, float] = {}
        if not self.editor.changes_weights:
            if not ask:
                return Result(self.records[index], (), 0, 0.0)  # a later edit holds all of them
            self.state = self.editor.edit(self.lm, [self._request(i) for i in range(index + 1)])
        else:
            refused = not self._add(self._request(index))
            seen = {} if self.gate is None else {"refused": float(refused)}
        seconds = time.perf_counter() - start
        self.progress.update("edits", index + 1, len(self.records))
        if not ask:
            return Result(self.records[index], (), 0, 0.0)
        asked = existing_edit(self.lm, self.editor, self.state, seconds, self.store)
        own = [case for case in self.cases[index] if not case.local]
        return self._result(index, self._ask(own, asked), asked, seen)

    def _add(self, request: Request) -> bool:
        """Make one more edit in the model that the earlier ones have left; whether it stays."""
        assert isinstance(self.state, dict)
        host = self.editor.host(self.lm).model
        with torch.enable_grad(), applied(host, self._changes()):
            changes = self.editor.each(self.lm, [request])
            if self.gate is not None:
                own = {name: LowRank(c.left[0].detach(), c.right[0].detach()) for name, c in changes.items()}
                if not self.gate(request, own):
                    return False
        for name, change in changes.items():
            dense = change[0].dense().detach().float()
            self.state[name] = self.state[name] + dense if name in self.state else dense
        return True

    def _request(self, index: int) -> Request:
        return Request(self.records[index].prompt, self.records[index].target)

    def _all(self, count: int) -> list[Result]:
        """All facts so far, asked again."""
        if not self.editor.changes_weights:
            self.state = self.editor.edit(self.lm, [self._request(index) for index in range(count)])
        asked = existing_edit(self.lm, self.editor, self.state, 0.0, self.store)
        seen = self.damage.look(asked, [0])[0] if self.damage is not None else {}
        cases = [case for index in range(count) for case in self.cases[index]]
        self._ask(cases, asked)
        if self.generated:
            score_generated([(0, case) for case in cases], asked, self.clean)
        self.progress.update(f"asked again after {count}", count, count)
        return [self._result(index, self.cases[index], asked, seen) for index in range(count)]

    def _ask(self, cases: Sequence[Case], asked: EditedModels) -> Sequence[Case]:
        self.trunk.ensure([text for case in cases for text in case.texts()])
        score_forced([(0, case) for case in cases], asked, self.store)
        return cases

    def _result(
        self, index: int, cases: Sequence[Case], asked: EditedModels, seen: Mapping[str, float]
    ) -> Result:
        norms: dict[str, float] = {}
        if isinstance(self.state, dict):
            norms = {name: float(d.double().norm()) / self.size[name] for name, d in self.state.items()}
        return Result(
            record=self.records[index],
            outcomes=tuple(case.outcome() for case in cases),
            rank=0,
            norm=fmean(norms.values()) if norms else 0.0,
            norms=norms,
            seconds=asked.seconds,
            edit=index,
            damage=seen,
        )


# --------------------
# What a sequential evaluation found: the facts right after their edits, and all of them asked again now and then.


@dataclass(frozen=True)
class Checkpoint:
    """What a model that has taken several edits answers.

    Attributes:
        edits: how many it has taken.
        results: one for each fact so far; their sizes are those of all edits together.
    """

    edits: int
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Sequential:
    """The whole of a sequential evaluation.

    Attributes:
        right_after: one result for each fact, asked right after its own edit (edit prompt and rewordings).
        checkpoints: in the order of their edits.
        protocol: how it was measured.
        clean: of the clean model, what the results' ``damage`` says.
        harness: what tasks of the evaluation harness gave after the last edit; empty where none was asked for.
    """

    right_after: tuple[Result, ...]
    checkpoints: tuple[Checkpoint, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    clean: Mapping[str, float] = field(default_factory=dict)
    harness: Mapping[str, Any] = field(default_factory=dict)

    def after(self, edits: int | None = None) -> Evaluation:
        """All facts as they were asked again after so many edits, by default after the last.

        Raises:
            RequestError: they were not asked then.
        """
        for point in self.checkpoints:
            if point.edits == (edits or len(self.right_after)):
                seconds = fmean(result.seconds for result in self.right_after)
                return Evaluation(point.results, self.protocol, seconds, seconds, self.clean)
        known = ", ".join(f"{point.edits:,}" for point in self.checkpoints)
        raise RequestError(f"All facts were asked again after {known} edits, not after {edits:,}.")

    def as_dict(self) -> dict[str, Any]:
        """What ``emendo evaluate --sequential --json`` prints."""
        points = []
        for point in self.checkpoints:
            so_far, last = self.right_after[: point.edits], point.results[-1]
            refused = [result.damage["refused"] for result in so_far if "refused" in result.damage]
            points.append(
                {
                    "edits": point.edits,
                    "refused": int(sum(refused)) if refused else None,
                    "right_after": {group: plain(scores) for group, scores in figures(so_far).items()},
                    "retained": {group: plain(scores) for group, scores in figures(point.results).items()},
                    "damage": {name: finite(value) for name, value in last.damage.items()},
                    "relative_norm": finite(last.norm),
                }
            )
        return {
            "records": len(self.right_after),
            "protocol": dict(self.protocol),
            "seconds_per_edit": fmean(result.seconds for result in self.right_after),
            "clean": {name: finite(value) for name, value in self.clean.items()},
            "checkpoints": points,
            "lm_eval": dict(self.harness) or None,
        }
