"""Scores of edits in one memory, over their number, beside the same facts in context and added up in the weights.

    python benchmarks/memory_curve.py --data counterfact-dev.json --load counterfact-train.json --png docs/memory.png

The same records are asked at every number N of edits in memory: with N below their number, in memories of N of them
each; with more, together with further records of both files. "in context": the router finds the edit, and its fact is
written before the prompt instead of changing the model. "added up": N edits in the weights at once; "fused": N edits
solved for together, with the paraphrases of their records left out. A prompt is
answered once under each edit that it fires at any N, and answers are kept in ``--out``, so that a stopped run goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import load, machine, parser, table

import emendo
from emendo._text import normalised
from emendo.data import Record, read_records
from emendo.data.portability import with_consequences
from emendo.edits.edit import Edit, Request, compose
from emendo.edits.fusing import fuse
from emendo.edits.per_request import applied_to_rows
from emendo.evaluate._prompts import with_fact
from emendo.evaluate.metrics import answer_match, same_answer
from emendo.evaluate.same_fact import SameFact
from emendo.memory.bank import EditMemory, Remembered
from emendo.memory.router import Router
from emendo.models.lm import LM
from emendo.models.tokenization import to_texts
from emendo.report.plots import BLUE, GREEN, INK, ORANGE, RED, axes_of, render

COUNTS = (1, 10, 100, 1_000, 10_000)
ENDS = (" is", " was", " are", " were")
"""Of prompts that are asked with "not", too."""
AT_ONCE = 16
TOGETHER = {"added": "added up", "fused": "fused"}
"""Ways to answer under several edits at once, and their names in the table."""
SCORES = {"edit success": "edit", "generalisation": "paraphrase", "locality": "neighbour"}


@dataclass(frozen=True)
class Case:
    """A prompt of an asked record.

    Attributes:
        record: its number.
        kind: ``edit``, ``paraphrase``, ``neighbour``, or ``negation`` (the edit prompt with "not").
        prompt: the prompt.
        answer: the target; of a neighbour, the stored answer.
    """

    record: int
    kind: str
    prompt: str
    answer: str

    @property
    def tokens(self) -> int:
        """To be generated."""
        return 8 if len(self.answer) < 16 else 16


@dataclass(frozen=True)
class Ask:
    """A case, and how it is answered.

    Attributes:
        case: its number.
        how: ``edit``, ``context``, ``added``, or ``fused``.
        edits: numbers of the records; none is the clean model.
    """

    case: int
    how: str = "edit"
    edits: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """A name for it."""
        return json.dumps([self.case, self.how, self.edits])


class Answers:
    """The answers to cases, kept in a file.

    Args:
        lm: the model.
        editor: makes the edits.
        records: the facts.
        cases: the prompts.
        file: keeps the answers.
    """

    def __init__(
        self, lm: LM, editor: emendo.Editor, records: Sequence[Record], cases: Sequence[Case], file: Path
    ) -> None:
        self.lm, self.editor, self.records, self.cases, self.file = lm, editor, records, cases, file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.known: dict[str, Any] = dict(json.loads(line) for line in lines if line.endswith("]"))
        self._edit = lru_cache(400)(self._made)
        self._fused = lru_cache(4)(lambda numbers: fuse(lm, [self._made(number) for number in numbers]))

    def _made(self, number: int) -> Edit:
        record = self.records[number]
        edit = self.editor.edit(self.lm, [Request(record.prompt, record.target, record.separator)])
        assert isinstance(edit, Edit)
        return edit

    def of(self, ask: Ask) -> Mapping[str, Any]:
        """The answer: the most likely tokens where the stored answer stands, and the generated text."""
        return self.known[ask.key]  # type: ignore[no-any-return]

    def find(self, asks: Sequence[Ask]) -> None:
        """Answer those that are not known yet."""
        left = [ask for ask in dict.fromkeys(asks) if ask.key not in self.known]
        left.sort(key=lambda ask: (ask.how, self.cases[ask.case].tokens, ask.edits, ask.case))
        done = 0
        while done < len(left):
            first = left[done]
            same = [
                ask
                for ask in left[done : done + AT_ONCE]
                if (ask.how, self.cases[ask.case].tokens) == (first.how, self.cases[first.case].tokens)
                and (ask.how not in TOGETHER or ask.edits == first.edits)
            ]
            found = [*self._answered(same)]
            with self.file.open("a", encoding="utf-8") as file:
                for ask, answer in zip(same, found, strict=True):
                    self.known[ask.key] = answer
                    file.write(json.dumps([ask.key, answer]) + "\n")
            done += len(same)
            print(f"\r{done} of {len(left)} prompts", end="", flush=True)
        print(flush=True)

    def _answered(self, asks: Sequence[Ask]) -> Iterator[dict[str, Any]]:
        cases = [self.cases[ask.case] for ask in asks]
        prompts = [case.prompt for case in cases]
        sets: list[list[Edit]] = [[] for _ in asks]
        if asks[0].how == "edit":
            sets = [[self._edit(number) for number in ask.edits] for ask in asks]
        elif asks[0].how == "context":
            prompts = [
                with_fact(self.records[ask.edits[0]], text) for ask, text in zip(asks, prompts, strict=True)
            ]
        elif asks[0].how == "added":
            sets = [[compose([self._edit(number) for number in asks[0].edits])]] * len(asks)
        else:
            with torch.enable_grad():
                sets = [[self._fused(asks[0].edits)]] * len(asks)
        own = [self.records[case.record].separator for case in cases]
        texts = to_texts(self.lm, [(p, c.answer, s) for p, c, s in zip(prompts, cases, own, strict=True)])
        with applied_to_rows(self.lm, sets) as edited, torch.no_grad():
            tokens = [logits.argmax(-1).tolist() for logits in edited.logits(texts)]
            said = edited.generate(prompts, cases[0].tokens)
        for text, most, answer in zip(texts, tokens, said, strict=True):
            yield {"tokens": most, "right": most == list(text.labels), "text": answer}


def cases_of(records: Sequence[Record], count: int) -> list[Case]:
    """The prompts of the first records."""
    found = []
    for number, record in enumerate(records[:count]):
        found.append(Case(number, "edit", record.prompt, record.target))
        found += [Case(number, "paraphrase", text, record.target) for text in record.paraphrases[:1]]
        found += [Case(number, "neighbour", probe.prompt, probe.answer) for probe in record.neighbours[:1]]
        if record.prompt.endswith(ENDS):
            found.append(Case(number, "negation", f"{record.prompt} not", record.target))
    return found


def fired(
    lm: LM, router: Router, records: Sequence[Record], cases: Sequence[Case], n: int, keys: Path
) -> list[int | None]:
    """The record whose edit each case fires, with N edits in memory."""
    asked = 1 + max(case.record for case in cases)
    found: dict[int, int | None] = {}
    for start in range(0, asked, n):
        memory = EditMemory(lm, router, keys=keys)
        memory.add_all(
            {
                i: Remembered(partial(_never, i), [records[i].prompt])
                for i in range(start, min(start + n, len(records)))
            }
        )
        own = [place for place, case in enumerate(cases) if start <= case.record < start + n]
        choices = memory.route([cases[place].prompt for place in own])
        found |= {place: choice.edit for place, choice in zip(own, choices, strict=True)}
    return [found[place] for place in range(len(cases))]


def _never(number: int) -> Edit:
    raise NotImplementedError(number)


def other_names(lm: LM, editor: emendo.Editor, router: Router, file: Path, count: int) -> dict[str, float]:
    """Built-in facts whose subject has another name, all in one memory and asked by that name, which nobody told it.

    Shares of those that their own edit answers, that are answered with the target, and that would be under the edit.
    """
    records = with_consequences(read_records("atlas", split="test").records)
    aliases = [(r, one) for r in records for one in r.consequences if one.kind == "alias"]
    facts = list({r.prompt: r for r, _ in aliases}.values())
    asked = {r.prompt: one for r, one in aliases}
    cases = [Case(i, "paraphrase", asked[r.prompt].prompt, r.target) for i, r in enumerate(facts)]
    chosen = fired(lm, router, facts, cases, len(facts), file.parent)
    answers = Answers(lm, editor, facts, cases, file)
    routed = [Ask(i) if edit is None else Ask(i, "edit", (edit,)) for i, edit in enumerate(chosen[:count])]
    own = [Ask(i, "edit", (i,)) for i in range(min(count, len(cases)))]
    answers.find([*routed, *own, *(Ask(i) for i in range(len(own)))])
    return {
        "right edit": float(np.mean([edit == i for i, edit in enumerate(chosen)])),
        "answered with the target": scores(cases, answers, routed)["paraphrase"],
        "under their own edit": scores(cases, answers, own)["paraphrase"],
    }


def scores(
    cases: Sequence[Case], answers: Answers, asks: Sequence[Ask], edited: Collection[int] = ()
) -> dict[str, float]:
    """The scores of some asks, generated and teacher forced.

    Args:
        cases: the prompts.
        answers: their answers.
        asks: how each is answered.
        edited: the cases of neighbours that another edit is about; "others" is locality without them.
    """
    found: dict[str, list[float]] = {}
    for ask in asks:
        case, answer, clean = cases[ask.case], answers.of(ask), answers.of(Ask(ask.case))
        if case.kind == "neighbour":
            forced = answer["tokens"] == clean["tokens"]
            said = same_answer(clean["text"], answer["text"], case.answer)
            found.setdefault("whole text", []).append(float(clean["text"] == answer["text"]))
            if ask.case not in edited:
                found.setdefault("others", []).append(float(said))
                found.setdefault("others, forced", []).append(float(forced))
        else:
            forced, said = answer["right"], answer_match(answer["text"], case.answer)
        found.setdefault(case.kind, []).append(float(said))
        found.setdefault(f"{case.kind}, forced", []).append(float(forced))
    return {name: float(np.mean(values)) for name, values in found.items()}


def edited_neighbours(records: Sequence[Record], cases: Sequence[Case], n: int) -> dict[int, list[int]]:
    """The cases of neighbours that another edit is about, with the records of these edits, with N edits in memory."""
    asked = 1 + max(case.record for case in cases)
    found: dict[int, list[int]] = {}
    for start in range(0, asked, n):
        same = SameFact(records[start : start + n])
        for place, case in enumerate(cases):
            if case.kind == "neighbour" and start <= case.record < start + n:
                found[place] = [start + edit for edit in same.asked(case.prompt, case.record - start)]
    return {place: edits for place, edits in found.items() if edits}


def routing(
    cases: Sequence[Case],
    chosen: Sequence[int | None],
    records: Sequence[Record],
    edited: Mapping[int, list[int]],
) -> dict[str, float]:
    """Shares of prompts in scope that fire their own edit, another one or none, and of neighbours that fire one."""
    scope = [
        "none"
        if edit is None
        else "right"
        if edit == case.record or normalised(records[edit].prompt) == normalised(records[case.record].prompt)
        else "wrong"
        for case, edit in zip(cases, chosen, strict=True)
        if case.kind in ("edit", "paraphrase")
    ]
    places = [place for place, case in enumerate(cases) if case.kind == "neighbour" and place not in edited]
    return {
        **{name: scope.count(name) / len(scope) for name in ("right", "wrong", "none")},
        "false fires": float(np.mean([chosen[place] is not None for place in places])),
        "edited neighbours": len(edited),
        "answered by their edit": float(np.mean([chosen[p] in own for p, own in edited.items()] or [1])),
    }


def measure(asked: argparse.Namespace, lm: LM, editor: emendo.Editor) -> dict[str, Any]:
    """All scores, by way of answering and number of edits."""
    own = read_records(asked.data).records
    prompts = {normalised(record.prompt) for record in own}
    more = read_records(asked.load).records if asked.load else ()
    records = [*own, *(record for record in more if normalised(record.prompt) not in prompts)]
    cases = cases_of(records, asked.asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    answers = Answers(lm, editor, records, cases, asked.out / "answers.jsonl")
    router = Router.shipped_for(lm)
    by_count = {n: fired(lm, router, records, cases, n, asked.out) for n in asked.counts if n <= len(records)}
    ways: dict[str, dict[int, list[Ask]]] = {
        name: {} for name in ("memory", "in context", *TOGETHER.values())
    }
    for n, chosen in by_count.items():
        for way, how in (("memory", "edit"), ("in context", "context")):
            ways[way][n] = [Ask(i) if edit is None else Ask(i, how, (edit,)) for i, edit in enumerate(chosen)]
    for how, counts in (("added", asked.sums), ("fused", asked.fused)):
        for n in counts:
            some = [i for i, case in enumerate(cases) if case.record < max(n, asked.added)]
            ways[TOGETHER[how]][n] = [
                Ask(i, how, tuple(range(start := cases[i].record // n * n, start + n)))
                for i in some
                if cases[i].kind != "negation"
            ]
    every = [ask for way in ways.values() for asks in way.values() for ask in asks]
    answers.find([*every, *(Ask(i) for i in range(len(cases)))])
    edited = {n: edited_neighbours(records, cases, n) for n in by_count}
    found: dict[str, Any] = {
        way: {n: scores(cases, answers, asks, edited.get(n, ())) for n, asks in counts.items()}
        for way, counts in ways.items()
    }
    found["added up"][1] = found["memory"].get(1, {})
    found["routing"] = {n: routing(cases, chosen, records, edited[n]) for n, chosen in by_count.items()}
    return found


def picture(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> bytes:
    """The scores over the number of edits."""
    figure, axes = axes_of(7.2, 4.4)
    for (label, kind), colour in zip(SCORES.items(), (BLUE, GREEN, ORANGE), strict=True):
        for way, line, mark in (("memory", "-", "o"), ("in context", ":", "s"), ("fused", "-.", "^")):
            points = sorted((n, values[kind]) for n, values in found[way].items())
            axes.plot(
                *zip(*points, strict=True), line, marker=mark, ms=4, color=colour, label=f"{label}, {way}"
            )
    points = sorted((n, values["edit"]) for n, values in found["added up"].items() if values)
    axes.plot(*zip(*points, strict=True), "--", marker="x", color=RED, label="edit success, added up")
    axes.set(xscale="log", ylim=(0, 1.02))
    axes.set_xlabel("edits", color=INK)
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.8)
    style = {"ncols": 2, "frameon": False, "labelcolor": INK, "fontsize": 9}
    figure.legend(loc="outside upper left", **style)
    return render(figure, "png")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and draw the picture."""
    options = parser(__doc__)
    options.add_argument("--load", help="a file of further records, in memory but not asked")
    options.add_argument("--editor", default="mend-smollm2-135m")
    options.add_argument("--asked", type=int, default=200, help="records that are asked, the first of --data")
    options.add_argument(
        "--added", type=int, default=40, help="records that are asked where edits are added up or fused"
    )
    options.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    options.add_argument(
        "--sums", type=int, nargs="+", default=[2, 5, 10, 20], help="edits that are added up"
    )
    options.add_argument("--fused", type=int, nargs="+", default=[10, 100], help="edits that are fused")
    options.add_argument("--aliases", type=int, default=60, help="prompts with another name of the subject")
    options.add_argument("--out", type=Path, default=Path("runs/memory-curve"))
    options.add_argument("--png", type=Path)
    asked = options.parse_args(argv)
    lm = load(asked)
    machine(asked)
    editor = emendo.Editor.from_pretrained(asked.editor)
    found = measure(asked, lm, editor)
    if asked.aliases:
        found["other names"] = other_names(
            lm, editor, Router.shipped_for(lm), asked.out / "aliases.jsonl", asked.aliases
        )
    (asked.out / "scores.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    table("Edit success / generalisation / locality", *_cells(found))
    if asked.aliases:
        names = found["other names"]
        table("Another name of the subject, not told", list(names), [[f"{x:.3f}" for x in names.values()]])
    if asked.png is not None:
        asked.png.write_bytes(picture(found))


def _cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    def three(values: Mapping[str, float], end: str = "") -> str:
        return " / ".join(f"{values[f'{kind}{end}']:.3f}" for kind in SCORES.values())

    def get(values: Mapping[str, float], *names: str) -> list[str]:
        return [f"{values[name]:.3f}" if name in values else "" for name in names]

    rows = []
    for way in ("memory", "in context", *TOGETHER.values()):
        for n, values in sorted(found[way].items()):
            routed = {} if way in TOGETHER.values() else found["routing"][n]
            if values:
                rows.append(
                    [
                        way,
                        f"{n:,}",
                        three(values),
                        three(values, ", forced"),
                        *get(values, "others", "whole text", "negation"),
                        *get(routed, "right", "wrong", "none", "false fires"),
                        f"{routed.get('edited neighbours', 0)}",
                        *get(routed, "answered by their edit"),
                    ]
                )
    head = ["", "edits", "generated", "teacher forced", "locality of others", "neighbour's whole text"]
    head += ['"not": still the target', "right edit", "wrong", "none", "false fires"]
    return [*head, "edited neighbours", "answered by their edit"], rows


if __name__ == "__main__":
    main()
