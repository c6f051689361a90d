"""Many edits in one memory: all of them are there at once, and every prompt is answered as the router decides.

Each edit is made from the clean model, as in :mod:`emendo.evaluate.run`; then all prompts of all records are routed
(:mod:`emendo.memory`) and answered under the edit that fires, or by the clean model. A prompt of one record may so be
answered under the edit of another. The edits are made again, chunk by chunk, when prompts need them, so the memory does
not grow with their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import islice
from statistics import fmean
from typing import Any

import torch

from emendo._text import normalised
from emendo.data.abilities import PASSAGES
from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.edits.edit import Edit, as_weights
from emendo.errors import RequestError
from emendo.evaluate._prompts import describe_framing, request_of
from emendo.evaluate._scoring import Row
from emendo.evaluate.edited_models import EditedModels, with_clean_row
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.results import MAIN, Result
from emendo.evaluate.run import EvaluateConfig, ResultStore, Run, cost, describe
from emendo.evaluate.same_fact import SameFact
from emendo.memory.bank import FALSE_FIRES, EditMemory, Remembered
from emendo.memory.router import Router
from emendo.models.lm import LM
from emendo.progress import SILENT, Progress

SMALL_TALK = (
    "Hello, how are you today?",
    "Thank you very much for your help.",
    "Can you tell me a joke?",
    "Please summarise the following text in one sentence.",
    "What can you help me with?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 9?",
    "Good night, see you tomorrow.",
    "Could you rewrite this email so that it sounds more polite?",
    "Explain how a bicycle works to a child.",
)
"""What people say to a chat model without asking for a fact."""
IN_SCOPE = ("edit", "paraphrase", "alias")


def evaluate_routed(
    lm: LM,
    editor: Editor,
    records: Sequence[Record],
    *,
    limit: int | None = None,
    generated: bool = True,
    batch: int = 25,
    new_tokens: int | None = None,
    router: Router | None = None,
    false_fires: float = FALSE_FIRES,
    subjects: bool = False,
    parts: ResultStore | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Put an edit of every record into one memory, and ask all prompts of all records.

    Args:
        lm: the model; it is unchanged afterwards.
        editor: an editor whose edits change weights.
        records: the facts.
        limit: use the first records only.
        generated: score free generation too.
        batch: the number of facts at once.
        new_tokens: the number of tokens to generate.
        router: by default the one that ships for the model.
        false_fires: the share of the prompts about other subjects that may fire an edit.
        subjects: tell the memory the subjects of the records; otherwise they are guessed from the prompts.
        parts: keeps the results; a part that it has is not measured again.
        progress: receives how far the work has come.

    Raises:
        RequestError: there are no records, a text does not fit the model's context, or the edits change no weights.
        MismatchError: the editor was trained for another model.
    """
    chosen = tuple(islice(records, limit))
    if not chosen:
        raise RequestError("There are no records to evaluate on.")
    if why := editor.no_changes_of(lm):
        raise RequestError(f"Only edits of weights can be routed, and {why}.")
    config = EvaluateConfig(generated, batch, new_tokens, fact_in_context=False)
    editor.check(lm)
    with editor.evaluating(), torch.no_grad():
        run = _RoutedRun(lm, editor, chosen, config, None, progress)
        run.route(router, false_fires, subjects)
        results = run.measure(parts)
        protocol = describe(lm, editor, config, None, describe_framing(lm, chosen))
        edits = f"{len(chosen)} in one memory, each made from the clean model; the prompt decides which one is in force"
        return Evaluation(
            results=results,
            protocol={
                **protocol,
                "edits": edits,
                "false_fires": false_fires,
                "subjects": "given" if subjects else "guessed",
            },
            seconds_per_edit=run.seconds_alone(),
            seconds_per_edit_in_batch=sum(r.seconds for r in results) / len(results),
            cost=cost(lm, editor),
            routing={**run.routing(), "locality_of_others": run.locality_of_others(results)},
        )


class _RoutedRun(Run):
    """An evaluation whose prompts stand under the edits that the router chooses."""

    fired: dict[str, int | None]
    """Prompt -> number of the record whose edit it fires."""

    def route(self, router: Router | None, false_fires: float, subjects: bool) -> None:
        """Choose an edit for every prompt."""
        asked = dict.fromkeys(case.prompt for cases in self.cases for case in cases)
        prompts = [*asked, *PASSAGES, *SMALL_TALK]
        memory = EditMemory(self.lm, router, false_fires=false_fires)
        memory.add_all(
            {
                number: Remembered(partial(self._edit, number), [r.prompt], r.subject if subjects else None)
                for number, r in enumerate(self.records)
            }
        )
        self.fired = {
            prompt: choice.edit for prompt, choice in zip(prompts, memory.route(prompts), strict=True)
        }

    def _edit(self, number: int) -> Edit:
        edit = self.editor.edit(self.lm, [request_of(self.records[number])])
        return as_weights(edit, "A memory holds changes of weights")

    def edits_for(self, groups: Sequence[int]) -> tuple[EditedModels, list[list[Row]]]:
        """The edits that the prompts of some groups fire, after those of the groups, and one that changes nothing."""
        cases = [self.cases[group] for group in groups]
        fired = {number for own in cases for case in own if (number := self.fired[case.prompt]) is not None}
        needed = list(dict.fromkeys([*groups, *sorted(fired)]))
        place: dict[int | None, int] = {number: row for row, number in enumerate(needed)}
        place[None] = len(needed)
        edited = with_clean_row(self._made(needed))
        return edited, [[(place[self.fired[case.prompt]], case) for case in own] for own in cases]

    @cached_property
    def edited_neighbours(self) -> dict[tuple[int, str], list[int]]:
        """The neighbours that another edit is about, as their record and prompt, with the edits."""
        same = SameFact(self.records)
        found = {
            (number, case.prompt): same.asked(case.prompt, number)
            for number, cases in enumerate(self.cases)
            for case in cases
            if case.kind == "neighbour"
        }
        return {place: edits for place, edits in found.items() if edits}

    def routing(self) -> dict[str, Any]:
        """How the prompts were routed."""
        asked = {normalised(record.prompt) for record in self.records}
        subjects = {record.subject for record in self.records if record.subject}
        scope: Counter[str] = Counter()
        edited: Counter[str] = Counter()
        fires: dict[str, Counter[bool]] = {}
        for number, cases in enumerate(self.cases):
            for case in cases:
                fired = self.fired[case.prompt]
                if case.kind in IN_SCOPE:
                    right = fired is not None and _same(self.records[fired], self.records[number])
                    scope["none" if fired is None else "right" if right else "wrong"] += 1
                elif edits := self.edited_neighbours.get((number, case.prompt)):
                    edited["none" if fired is None else "right" if fired in edits else "wrong"] += 1
                elif case.local:
                    if normalised(case.prompt) in asked:
                        continue  # the prompt of another edit
                    fires.setdefault(case.kind, Counter())[fired is not None] += 1
                    if case.kind == "neighbour":
                        named = any(subject in case.prompt for subject in subjects)
                        kind = "neighbour_of_edited_subject" if named else "neighbour_of_other_subject"
                        fires.setdefault(kind, Counter())[fired is not None] += 1
        for kind, texts in (("plain_text", PASSAGES), ("small_talk", SMALL_TALK)):
            fires[kind] = Counter(self.fired[text] is not None for text in texts)
        return {
            **_shares(scope),
            "edited_neighbours": _shares(edited),
            "false_fires": {kind: count[True] / count.total() for kind, count in fires.items()},
            "out_of_scope": {kind: count.total() for kind, count in fires.items()},
        }

    def locality_of_others(self, results: Sequence[Result]) -> dict[str, float | None]:
        """Locality at the prompts that no edit of the memory is about, teacher forced and generated."""
        found: dict[str, float | None] = {}
        for measure in ("teacher_forced", "generated"):
            rows = [
                [
                    float(value)
                    for one in result.outcomes
                    if one.kind in MAIN["locality"] and (number, one.prompt) not in self.edited_neighbours
                    if (value := getattr(one, measure)) is not None
                ]
                for number, result in enumerate(results)
            ]
            found[measure] = fmean(map(fmean, kept)) if (kept := [row for row in rows if row]) else None
        return found


def _shares(count: Counter[str]) -> dict[str, float]:
    """The shares of prompts that the right edit answers, a wrong one, or none, and their number."""
    total = count.total()
    shares = {name: count[name] / total for name in ("right", "wrong", "none")} if total else {}
    return {**shares, "prompts": total}


def _same(one: Record, other: Record) -> bool:
    """Whether two records edit the same fact in the same way."""
    return one is other or (normalised(one.prompt), one.target) == (normalised(other.prompt), other.target)
