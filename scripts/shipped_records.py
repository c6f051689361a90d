"""The training records of the editor that ships with emendo.

CounterFact's training file, the built-in facts and ParaRel, with prompts as statements, questions and chat turns,
paraphrases with an unrelated sentence in front, and as locality the model's own continuations of neighbours, of negated
prompts and of other prompts about the same subject. Every choice follows from the seed.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emendo.data import Probe, Record, read_records
from emendo.models.lm import LM

SEED = 0
CHAT_SHARE = 0.25
"""Share of the records that are chat turns as a whole."""
CROSS_SHARE = 0.15
"""Share of the other records that have one paraphrase as a chat turn."""
NOISE_SHARE = 0.25
"""Share of the records of ParaRel and of the built-in facts that have a sentence before one paraphrase."""
LONG_SHARE = 0.35
"""Share of the records whose locality has whole continuations in place of short answers."""
LONG = 10
"""Tokens of a whole continuation."""
OTHERS = 1_500
"""Records of the built-in facts and of ParaRel in the second and third phase."""
END = "<|im_end|>"
"""The end of an answer in the chat template."""
BATCH = 64
"""Prompts that the model continues at once."""

ABOUT = (  # other prompts about a subject, whose answers an edit must not change
    "{} is known for",
    "The history of {}",
    "I once read a book about {}. It",
    "The name {} comes from",
    "My friend asked me about {}, and I",
    "{} and",
    "Here is a short text about {}:",
    "People who like {} also like",
)


@dataclass(frozen=True)
class Plan:
    """A record whose locality answers are not known yet."""

    record: Record
    near: tuple[str, ...]
    apart: str
    long: bool

    def continued(self) -> tuple[str, ...]:
        """The prompts whose continuation must stay: one neighbour and the other prompt about the subject."""
        return (*self.near[:1], self.apart) if self.long else ()


def make_records(lm: LM, data: Path, passages: Sequence[str], counts: dict[str, int]) -> list[Record]:
    """Make the training records, in a fixed shuffled order.

    Args:
        lm: the model, which writes the locality answers.
        data: the folder with ``counterfact-train.json``, ``counterfact-dev.json`` and ``pararel.jsonl``.
        passages: sentences to stand before paraphrases.
        counts: by source (``counterfact``, ``atlas``, ``pararel``), the number of facts.
    """
    rng = random.Random(SEED)
    plans = [_plan(record, lm, passages, rng) for record in _facts(data, rng, counts)]
    return _with_answers(lm, plans)


def second_records(data: Path, first: Sequence[Record]) -> list[Record]:
    """The records of the second phase: CounterFact as it stands, and some chat turns and other facts of the first.

    Args:
        data: the folder of :func:`make_records`.
        first: the records of the first phase.
    """
    held_out = {record.subject for record in read_records(data / "counterfact-dev.json")}
    plain = [
        replace(record, relation=record.prompt.replace(record.subject or record.prompt, "{}"))
        for record in read_records(data / "counterfact-train.json")
        if record.subject not in held_out
    ]
    chat = [record for record in first if record.prompt.startswith("<|")]
    other = [
        record for record in first if not record.prompt.startswith("<|") and not (record.id or "").isdigit()
    ]
    found = [*plain, *chat[:2000], *other[:OTHERS]]
    random.Random(SEED).shuffle(found)
    return found


def third_records(data: Path, first: Sequence[Record]) -> list[Record]:
    """The records of the third phase: CounterFact with more locality, chat turns that end (twice), and other facts.

    Where the first phase has a whole continuation of a neighbour, it stands beside the neighbour's stored answer; else
    the first phase's other prompt about the subject does. The target of a chat turn is closed by the end of the turn,
    so that the answer stops there.

    Args:
        data: the folder of :func:`make_records`.
        first: the records of the first phase.
    """
    turns = [record for record in first if record.prompt.startswith("<|")]
    texts = [record for record in first if not record.prompt.startswith("<|")]
    whole = {
        probe.prompt: probe for record in first for probe in record.neighbours if " " in probe.answer[8:]
    }
    about = {record.id: record.unrelated for record in texts}
    found = []
    for record in second_records(data, ()):
        near = record.neighbours[0]
        own = (whole[near.prompt],) if near.prompt in whole else about.get(record.id, ())
        found.append(replace(record, unrelated=own))
    found += [replace(record, target=record.target + END) for record in turns] * 2
    found += [record for record in texts if not (record.id or "").isdigit()][:OTHERS]
    random.Random(SEED).shuffle(found)
    return found


def fourth_records(lm: LM, data: Path, passages: Sequence[str], counts: dict[str, int]) -> list[Record]:
    """The records of the fourth phase: all facts in fresh forms, each with a whole continuation that must stay.

    A record keeps the short answers of two neighbours; beside them stands the model's own continuation, of a neighbour
    or of another prompt about the subject, half and half. The targets of chat turns are closed.

    Args:
        lm: the model, which writes the continuations.
        data: the folder of :func:`make_records`.
        passages: sentences to stand before paraphrases.
        counts: as in :func:`make_records`.
    """
    rng = random.Random(SEED + 4)
    plans = [_plan(record, lm, passages, rng) for record in _facts(data, rng, counts)]
    whole = [plan.near[-1] if plan.near and rng.random() < 0.5 else plan.apart for plan in plans]
    found = continuations(lm, set(whole))
    records = []
    for plan, text in zip(plans, whole, strict=True):
        record = plan.record
        answer = record.answer or record.target
        records.append(
            replace(
                record,
                target=record.target + END * record.prompt.startswith("<|"),
                neighbours=tuple(Probe(near, answer) for near in plan.near),
                unrelated=(Probe(text, found[text] if found[text].strip() else answer),),
                consequences=(),
            )
        )
    return records


def _facts(data: Path, rng: random.Random, counts: dict[str, int]) -> list[Record]:
    """The facts of the three sources whose subjects are in no held-out set, shuffled."""
    held_out = {record.subject for record in read_records(data / "counterfact-dev.json")}
    held_out |= {
        record.subject for split in ("validation", "test") for record in read_records("atlas", split=split)
    }
    facts: list[Record] = []
    for name, found in (
        ("counterfact", read_records(data / "counterfact-train.json").records),
        ("atlas", read_records("atlas", split="train").records),
        ("pararel", _pararel(data / "pararel.jsonl", rng)),
    ):
        free = [record for record in found if record.subject not in held_out]
        rng.shuffle(free)
        facts += free[: counts[name]]
    rng.shuffle(facts)
    return facts


def _pararel(file: Path, rng: random.Random) -> list[Record]:
    """A record for each fact: statement or question, with both as paraphrases, and another object as the target."""
    questions = tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        relation = json.loads(line)
        name, facts = relation["relation"], relation["facts"]
        statements = [
            pattern.rstrip(" .").removesuffix("[Y]").rstrip()
            for pattern in relation["patterns"]
            if pattern.rstrip(" .").endswith("[Y]")
        ]
        if name not in questions or not statements:
            continue
        objects = sorted({answer for _, answer in facts})
        by_object = defaultdict(list)
        for subject, answer in facts:
            by_object[answer].append(subject)
        for subject, answer in facts:
            target = rng.choice([one for one in rng.sample(objects, 2) if one != answer])
            forms = [*rng.sample(statements, min(3, len(statements))), *questions[name]]
            rng.shuffle(forms)
            same = [one for one in by_object[answer] if one != subject]
            others = rng.sample(same, min(2, len(same))) or [rng.choice(facts)[0]]
            prompt, *rest = [form.replace("[X]", subject) for form in forms]
            near = tuple(
                Probe(rng.choice(forms).replace("[X]", other), answer) for other in others if other != subject
            )
            records.append(
                Record(prompt, target, subject, name, paraphrases=tuple(rest), neighbours=near, answer=answer)
            )
    return records


def _plan(record: Record, lm: LM, passages: Sequence[str], rng: random.Random) -> Plan:
    """Choose the form of a record and the prompts of its locality."""
    chat = rng.random() < CHAT_SHARE
    framed = lm.reading(chat=True).framing.frame
    paraphrases = list(record.paraphrases)
    if record.relation is not None and rng.random() < NOISE_SHARE:  # CounterFact's own have such sentences
        paraphrases[0] = f"{rng.choice(passages)} {paraphrases[0]}"
    paraphrases = paraphrases[:2]
    subject = record.subject or record.prompt
    apart = [rng.choice(ABOUT).format(subject)]
    if record.prompt.endswith((" is", " was", " are")):
        apart.append(f"{record.prompt} not")
    elif not record.prompt.endswith("?"):
        apart.append(f"It is not true that {record.prompt}")
    near = [probe.prompt for probe in record.neighbours]
    rng.shuffle(near)
    frame: Callable[[str], str] = framed if chat else str
    if not chat and rng.random() < CROSS_SHARE:
        paraphrases[-1] = framed(paraphrases[-1])
    relation = record.relation or record.prompt.replace(subject, "{}")
    found = replace(
        record,
        prompt=frame(record.prompt),
        paraphrases=tuple(text if text.startswith("<|") else frame(text) for text in paraphrases),
        relation=f"{relation} (chat)" if chat else relation,
    )
    long = rng.random() < LONG_SHARE
    return Plan(found, tuple(map(frame, near[:2])), frame(rng.choice(apart)), long)


def _with_answers(lm: LM, plans: Sequence[Plan]) -> list[Record]:
    """Fill in the answers that must stay: the model's own continuation, or the true answer."""
    found = continuations(lm, {text for plan in plans for text in plan.continued()})

    def probe(plan: Plan, text: str) -> Probe:
        own = found[text] if text in plan.continued() else ""
        return Probe(text, own if own.strip() else plan.record.answer or plan.record.target)

    return [
        replace(
            plan.record,
            neighbours=tuple(probe(plan, text) for text in plan.near),
            unrelated=(probe(plan, plan.apart),),
            consequences=(),
        )
        for plan in plans
    ]


def continuations(lm: LM, prompts: Iterable[str]) -> dict[str, str]:
    """The model's own greedy continuation of each prompt."""
    ordered = sorted(prompts, key=lambda text: (len(text), text))
    found: dict[str, str] = {}
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        found |= dict(zip(part, lm.generate(part, LONG), strict=True))
        if start % (BATCH * 20) == 0:
            print(f"continuations: {start} of {len(ordered)}", flush=True)
    return found
