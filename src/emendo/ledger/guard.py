"""The guard: measures an edit before it enters the ledger, and all active edits together.

Every figure compares the model as the edit finds it, with all earlier edits attached, and with this edit on top. The
drift is also measured from the base model, so that many small changes are noticed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from emendo.edits.edit import Edit, Request
from emendo.errors import RequestError
from emendo.ledger._composition import Candidate, EditStack, evidence
from emendo.ledger._schema import Entry, Operation, Values
from emendo.ledger.health import Drift, Health
from emendo.ledger.probes import ProbeOutputs, ProbeRunner, Probes
from emendo.memory.bank import RoutedLM
from emendo.memory.router import Query
from emendo.models.framing import Pair
from emendo.models.lm import LM
from emendo.models.tokenization import to_texts


def targets_reached(lm: LM, pairs: Sequence[Pair]) -> list[bool]:
    """For each prompt and target, whether every token of the target is the most likely one, teacher forced.

    Raises:
        RequestError: a text does not fit the model.
    """
    texts = to_texts(lm, pairs)
    return [
        bool((logits.argmax(-1).cpu() == torch.tensor(text.labels)).all())
        for text, logits in zip(texts, lm.logits(texts), strict=True)
    ]


def largest_norm(edit: Edit, lm: LM) -> float:
    """The largest ``||dW|| / ||W||`` of any matrix."""
    return max(edit.relative_norms(lm).values(), default=0.0)


@dataclass(frozen=True, slots=True)
class EditOutcome:
    """Whether an active edit still has its effect.

    Attributes:
        entry: the edit.
        reached: for each of its requests, whether the target is the most likely answer.
    """

    entry: Entry
    reached: tuple[bool, ...]

    @property
    def holds(self) -> bool:
        """Whether all of its targets are reached."""
        return all(self.reached)


@dataclass(frozen=True, slots=True)
class Examination:
    """Measurement of all active edits together.

    Attributes:
        operation: the state that was measured.
        outcomes: one for each active edit, in their order.
        drift: drift on the probes, from the base model.
    """

    operation: int
    outcomes: tuple[EditOutcome, ...]
    drift: Drift

    @property
    def retention(self) -> float:
        """Share of the requests whose target is still the answer; 1 without edits."""
        return fmean([float(right) for each in self.outcomes for right in each.reached] or [1.0])

    @property
    def lost(self) -> list[EditOutcome]:
        """The edits that lost a target."""
        return [each for each in self.outcomes if not each.holds]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "edits": len(self.outcomes),
            "retention": self.retention,
            "lost": [each.entry.id for each in self.lost],
            "drift": asdict(self.drift),
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """The outputs on the probes, and the edits of the memory that answer them, by their digests."""

    chosen: tuple[str | None, ...]
    outputs: ProbeOutputs


class Guard:
    """Measures edits on top of others.

    Args:
        stack: the model and the edits of its ledger.
        probes: prompts and text that must not change.
    """

    def __init__(self, stack: EditStack, probes: Probes) -> None:
        self.stack = stack
        self._runner = ProbeRunner(stack.lm, probes)
        self._kept: dict[tuple[str, ...], _Measured] = {}  # by the digests of the edits in the weights
        self._queries: list[Query] | None = None

    @torch.no_grad()
    def prepare(self, state: Operation) -> None:
        """Take the outputs after an operation, so that the next edit need not wait for them."""
        self._outputs_of(None)
        self._outputs_of(state)

    @torch.no_grad()
    def health(
        self, state: Operation, edit: Edit, paraphrases: Sequence[str] = (), scope: Values | None = None
    ) -> Health:
        """The figures of an edit on top of the edits active after an operation.

        Args:
            state: the operation.
            edit: the edit.
            paraphrases: paraphrases of its one request.
            scope: of an edit that goes into the memory; there it is asked as every prompt is, through the router.

        Raises:
            MismatchError: it was made for another model.
            RequestError: paraphrases for an edit of several requests, or a text that does not fit the model.
        """
        lm, requests = self.stack.lm, edit.origin.requests
        edit.check(lm)
        if paraphrases and len(requests) != 1:
            raise RequestError(f"Paraphrases belong to an edit of one request; this one has {len(requests)}.")
        before, clean = self._outputs_of(state), self._outputs_of(None)
        pairs = [*(r.pair for r in requests), *(requests[0].asking(text).pair for text in paraphrases)]
        with self.stack.applied(state, Candidate(edit, scope)) as edited:
            right = targets_reached(edited.reading(chat=edit.origin.chat), pairs)
            in_weights = self._in_weights(state)
            after = self._measured((*in_weights, edit.digest) if scope is None else in_weights, edited)
        reached, generalised = right[: len(requests)], right[len(requests) :]
        excluded = self._edited_probes(state) | {*(request.prompt for request in requests), *paraphrases}
        return Health.of(
            edit_success=fmean(map(float, reached)) if reached else 1.0,
            paraphrase_success=fmean(map(float, generalised)) if generalised else None,
            norm=largest_norm(edit, lm),
            own=after.drift(before, excluded),
            total=after.drift(clean, excluded),
        )

    def captured(self, state: Operation, edit: Edit, scope: Values) -> list[int]:
        """Numbers of the edits in the memory whose own prompt a new edit would answer instead.

        Only edits with a similar prompt are compared, so the time does not grow with their number.
        """
        memory = self.stack.memory(state)
        if not len(memory):
            return []
        similar: set[int] = set()
        for query in memory.read_own([request.prompt for request in edit.origin.requests]):
            similar |= memory.router.scores(query, memory.index).keys()
        entries = self.stack.ledger.entries(sorted(similar))
        queries = memory.read_own([str(entry.requests[0]["prompt"]) for entry in entries])
        number = memory.add(edit, **evidence(scope))
        try:
            chosen = [memory.choose(query) for query in queries]
        finally:
            memory.remove(number)
        return [entry.id for entry, choice in zip(entries, chosen, strict=True) if choice.edit == number]

    @torch.no_grad()
    def examine(self, state: Operation) -> Examination:
        """Measure every edit that was active after an operation, and the drift on the probes."""
        entries = self.stack.ledger.entries(state.active)
        with self.stack.applied(state) as edited:
            reached = self._reached(edited, entries)
        outcomes = tuple(EditOutcome(entry, tuple(reached[entry.id])) for entry in entries)
        drift = self._outputs_of(state).drift(self._outputs_of(None), self._edited_probes(state))
        return Examination(state.id, outcomes, drift)

    def _reached(self, lm: LM, entries: Sequence[Entry]) -> dict[int, list[bool]]:
        """For each edit's number which of its targets are reached, prompted in the way in which the edit was made."""
        found: dict[int, list[bool]] = {}
        for chat in (False, True):
            own = [entry for entry in entries if entry.chat == chat]
            pairs = [Request.of(r).pair for entry in own for r in entry.requests]
            reached = iter(targets_reached(lm.reading(chat=chat), pairs) if pairs else ())
            found |= {entry.id: [next(reached) for _ in entry.requests] for entry in own}
        return found

    def _edited_probes(self, state: Operation) -> set[str]:
        """Probes that an active edit changes on purpose."""
        probes = self._runner.prompts
        edits = self.stack.ledger.with_same_prompts([{"prompt": each} for each in probes], state.id)
        return {request["prompt"] for entry in edits for request in entry.requests} & {*probes}

    def _outputs_of(self, state: Operation | None) -> ProbeOutputs:
        """The outputs on the probes after an operation, or of the base model."""
        with self.stack.applied(state) as edited:
            return self._measured(self._in_weights(state), edited)

    def _in_weights(self, state: Operation | None) -> tuple[str, ...]:
        return tuple(self.stack.ledger.digests(self.stack.in_weights(state)))

    def _measured(self, in_weights: tuple[str, ...], lm: LM) -> ProbeOutputs:
        """The outputs on the probes now; those of the base weights and of the last two others are kept.

        Where the edits in the weights are those of kept outputs, only the probes that another edit of the memory
        answers are run again.
        """
        chosen, kept = self._chosen(lm), self._kept.get(in_weights)
        if kept is None:
            outputs = self._runner.run(lm)
        else:
            places = [i for i, pair in enumerate(zip(kept.chosen, chosen, strict=True)) if pair[0] != pair[1]]
            outputs = self._runner.rerun(lm, kept.outputs, places) if places else kept.outputs
        others = [each for each in self._kept if each not in ((), in_weights)]
        self._kept = {each: self._kept[each] for each in ((), *others[-1:]) if each in self._kept}
        self._kept[in_weights] = _Measured(chosen, outputs)
        return outputs

    def _chosen(self, lm: LM) -> tuple[str | None, ...]:
        """The edit of the memory that answers each probe."""
        if not isinstance(lm, RoutedLM):
            return (None,) * len(self._runner.texts)
        memory = lm.memory
        if self._queries is None:
            prompts = [lm.prompt_of(text) for text in self._runner.texts]
            self._queries = memory.router.read(self.stack.lm, prompts)
        numbers = [memory.choose(query).edit for query in self._queries]
        return tuple(None if number is None else memory.edit(number).digest for number in numbers)
