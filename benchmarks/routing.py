"""Does a prompt find its edit, among many? Shares by kind of prompt, and the time of routing.

    python benchmarks/routing.py --data counterfact-dev.json

The router has not seen the subjects of that file; without it the built-in facts alone are asked. "hits" are prompts
answered by their own edit at the threshold at which a given share of the others fires an edit; "at 2%" is the threshold
that ships.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from _common import CLOCKS, load, machine, parser, table

from emendo.data import Record, read_records
from emendo.data.abilities import PASSAGES
from emendo.data.portability import with_consequences
from emendo.edits.edit import Edit
from emendo.evaluate.routed import SMALL_TALK
from emendo.memory.bank import EditMemory, Remembered
from emendo.memory.index import Index, Scope
from emendo.memory.router import Floats, Query, Router, index_of
from emendo.memory.words import Prompt
from emendo.models.lm import LM

RATES = (0.01, 0.02, 0.05, 0.1)
ABROAD = ("Die Hauptstadt von {} ist", "La capitale de {} est", "La capital de {} es", "La capitale di {} è")
AT_ONCE = 50_000
TALK = " ".join(PASSAGES[:3])
REMARKS = (
    "Thank you! I will write it down.",
    "Great, that is all I wanted to know about it.",
    "Can you write a poem about it?",
    "I have never heard of it before.",
    "Please translate it into Spanish.",
    "Could you explain it to a child?",
    "She told me the same thing yesterday.",
    "Why do people like it so much?",
    "Could you make it shorter?",
    "He would be surprised to hear that.",
    "Let us not talk about it any more.",
    "I read about it in their book last week.",
)
"""Turns with a pronoun that ask for no fact."""
Best = tuple[float, int]
"""A score, and the number of its edit."""


class Asked:
    """A router with some edits in memory.

    Args:
        router: the router.
        lm: the model.
        edits: the records of the edits.
        subjects: tell it the subjects.
    """

    def __init__(self, router: Router, lm: LM, edits: Sequence[Record], *, subjects: bool = False) -> None:
        self.router, self.lm, self.edits = router, lm, edits
        prompts = [Prompt.read(r.prompt, r.subject if subjects else None) for r in edits]
        self.index = index_of(router, lm, prompts)
        self.threshold = router.judge.threshold(0.02)

    def best(self, prompts: Sequence[str]) -> list[Best]:
        """The edit with the highest score for each prompt."""
        found = []
        for query in self.router.read(self.lm, prompts):
            scores = self.router.scores(query, self.index)
            found.append(max(((score, number) for number, score in scores.items()), default=(0.0, -1)))
        return found

    def fires(self, prompts: Sequence[str]) -> float:
        """The share of prompts that an edit answers."""
        return float(np.mean([score >= self.threshold for score, _ in self.best(prompts)]))

    def right(self, prompts: Sequence[str]) -> float:
        """The share of prompts that the edit of the same place answers."""
        found = self.best(prompts)
        return float(np.mean([n == i and score >= self.threshold for i, (score, n) in enumerate(found)]))


def row(name: str, own: Sequence[Best], others: Sequence[Best], asked: Asked) -> tuple[str, ...]:
    """Hits at several shares of false fires, and both at the threshold that ships."""
    scores = np.sort([score for score, _ in others])
    cells = []
    for rate in RATES:
        above = scores[len(scores) - int(rate * len(scores)) - 1]
        cells.append(f"{np.mean([n == i and score > above for i, (score, n) in enumerate(own)]):.3f}")
    hits = np.mean([n == i and score >= asked.threshold for i, (score, n) in enumerate(own)])
    return (name, str(len(own)), *cells, f"{hits:.3f} / {np.mean(scores >= asked.threshold):.3f}")


def counterfact(router: Router, lm: LM, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Paraphrases against neighbours of other subjects."""
    subjects = {record.subject for record in records if record.subject}
    near = [record.neighbours[0].prompt for record in records]
    near = [text for text in near if not any(subject in text for subject in subjects)]
    rows = []
    for name, given in (("subject guessed", False), ("subject given", True)):
        asked = Asked(router, lm, records, subjects=given)
        own = asked.best([record.paraphrases[0] for record in records])
        rows.append(row(f"CounterFact, {name}", own, asked.best(near), asked))
    return rows


def same_subject(router: Router, lm: LM, records: Sequence[Record]) -> tuple[str, ...]:
    """Paraphrases against prompts about the same subject with another relation, of unseen subjects."""
    rng, by_subject = random.Random(0), dict[str, list[Record]]()
    for record in records:
        by_subject.setdefault(record.subject or "", []).append(record)
    edits, own, others = [], [], []
    for about in by_subject.values():
        first = rng.choice(about)
        if apart := [record for record in about if record.relation != first.relation]:
            other = rng.choice(apart)
            edits.append(first)
            own.append(rng.choice(first.paraphrases))
            others.append(rng.choice((other.prompt, *other.paraphrases)))
    asked = Asked(router, lm, edits)
    return row("same subject, another relation", asked.best(own), asked.best(others), asked)


def hard(router: Router, lm: LM, records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """The cases that CounterFact does not have: what should happen, how often it does, and of how many."""
    rng = random.Random(0)
    edits = list({record.subject: record for record in records if record.subject in record.prompt}.values())
    asked = Asked(router, lm, edits)
    others = [rng.choice([one for one in edits if one is not record]) for record in edits]
    paraphrases = [rng.choice(record.paraphrases) for record in edits]
    named = [(r, i) for i, r in enumerate(edits)]
    alias = [r for r in with_consequences(records) if any(one.kind == "alias" for one in r.consequences)]
    by_alias = [next(one.prompt for one in r.consequences if one.kind == "alias") for r in alias]
    capitals = [r for r in edits if r.relation == "country_capital"]
    cases = [
        ("another name of the subject, not told", Asked(router, lm, alias).right(by_alias), len(alias)),
        (
            "two subjects: another edit's is named first",
            asked.right([f"Unlike {o.subject}: {p}" for o, p in zip(others, paraphrases, strict=True)]),
            len(edits),
        ),
        (
            "a long conversation before the question",
            asked.right([f"{TALK} {p}" for p in paraphrases]),
            len(edits),
        ),
        (
            "a pronoun: the subject in the sentence before",
            asked.right(
                [
                    f"Tell me about {r.subject}. {p.replace(r.subject or '', 'it')}"
                    for (r, _), p in zip(named, paraphrases, strict=True)
                ]
            ),
            len(edits),
        ),
    ]
    if capitals:
        abroad = Asked(router, lm, capitals)
        found = [abroad.right([form.format(r.subject) for r in capitals]) for form in ABROAD]
        cases.append(("German, French, Spanish and Italian", float(np.mean(found)), 4 * len(capitals)))
    longer = [r.prompt.replace(r.subject or "", f"New {r.subject} Hill") for r in edits]
    out = [
        ("the subject inside another name", asked.fires(longer), len(longer)),
        ("small talk", asked.fires(SMALL_TALK), len(SMALL_TALK)),
        ("plain text", asked.fires(PASSAGES), len(PASSAGES)),
    ]
    rows = [(name, "the right edit", f"{share:.3f}", str(count)) for name, share, count in cases]
    return rows + [(name, "none", f"{1 - share:.3f}", str(count)) for name, share, count in out]


def conversations(lm: LM, records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """Turns of a chat: what should happen, how often it does, and of how many."""
    edits = [r for r in records if r.subject and r.subject in r.prompt and r.subject in r.paraphrases[0]]
    memory = EditMemory(lm)
    memory.add_all({i: Remembered(never, [r.prompt]) for i, r in enumerate(edits)})
    asked = [r.paraphrases[0] for r in edits]
    before = [f"{r.prompt}?" for r in (*edits[1:], edits[0])]
    pronouns = [
        (f"Tell me about {r.subject}.", text.replace(r.subject or "", "it"))
        for r, text in zip(edits, asked, strict=True)
    ]
    talk = [(f"{r.prompt}?", SMALL_TALK[i % len(SMALL_TALK)]) for i, r in enumerate(edits)]
    it = [(f"{r.prompt}?", REMARKS[0]) for r in edits]
    remarks = [(f"{r.prompt}?", REMARKS[i % len(REMARKS)]) for i, r in enumerate(edits)]

    def right(turns: Sequence[str | Sequence[str]]) -> str:
        return f"{np.mean([choice.edit == i for i, choice in enumerate(memory.route(turns))]):.3f}"

    def none(turns: Sequence[str | Sequence[str]]) -> str:
        return f"{np.mean([choice.edit is None for choice in memory.route(turns)]):.3f}"

    count = str(len(edits))
    return [
        ("a paraphrase in one turn", "the right edit", right([(text,) for text in asked]), count),
        (
            "the prompt of another edit, then a paraphrase",
            "the right edit",
            right([*zip(before, asked, strict=True)]),
            count,
        ),
        ("the subject, then a paraphrase with a pronoun", "the right edit", right(pronouns), count),
        ("the prompt of an edit, then small talk", "none", none(talk), count),
        ('the prompt of an edit, then "I will write it down"', "none", none(it), count),
        ("the prompt of an edit, then a remark with a pronoun", "none", none(remarks), count),
    ]


def never() -> Edit:
    """The edits are not applied."""
    raise NotImplementedError


def passages(router: Router, lm: LM, records: Sequence[Record], file: str) -> tuple[str, str, str, str]:
    """Paragraphs of a plain text with all edits in memory."""
    texts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if len(line) > 100]
    texts = [" ".join(text.split()[:400]) for text in texts[:1000]]
    return "passages of --text", "none", f"{1 - Asked(router, lm, records).fires(texts):.3f}", str(len(texts))


def cost(
    router: Router, lm: LM, records: Sequence[Record], counts: Sequence[int], clock: Callable[[], float]
) -> list[tuple[str, ...]]:
    """The time to route a prompt among many edits, against one forward pass of it, and what the edits take.

    The edits are invented: names of two words of real subjects in real wordings, with keys between real ones.
    """
    rng, rows = random.Random(0), []
    query = "The capital city of Australia is called"
    read = router.read(lm, [query])[0]
    one = None if read.key is None else read.key[None]
    forward = seconds(lambda: lm.next_logits([query]), clock)
    real = router.keys(lm, [record.prompt for record in records])
    words = [word for record in records for word in (record.subject or "").split()]
    forms = [record.prompt.replace(record.subject or "", "{}") for record in records]
    for count in counts:
        with TemporaryDirectory() as folder:
            index = Index(router.key_size, Path(folder))
            start = time.process_time()
            for first in range(0, count, AT_ONCE):
                texts = [
                    f"{rng.choice(words)} {rng.choice(words)}" for _ in range(min(AT_ONCE, count - first))
                ]
                scopes = [
                    Scope(first + i, Prompt.read(rng.choice(forms).replace("{}", name), name))
                    for i, name in enumerate(texts)
                ]
                index.add(scopes, between(real, len(scopes), first))
            index.write()
            built = time.process_time() - start
            stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            routing = seconds(lambda index=index: router.scores(Query(read.prompt, read.key), index), clock)
            adding = seconds(
                lambda index=index: (index.add([Scope(-1, read.prompt)], one), index.remove(-1)), clock
            )
            reading = seconds(lambda folder=folder: Index(router.key_size, Path(folder)), clock, 3)
        rows.append(
            (
                f"{count:,}",
                f"{routing * 1e3:.2f} ms",
                f"{routing / forward:.1%}",
                f"{adding * 1e3:.2f} ms",
                f"{built / count * 1e3:.2f} ms",
                f"{stored / count:,.0f}",
                f"{reading:.2f} s",
            )
        )
    return rows


def between(real: Floats | None, count: int, seed: int) -> Floats | None:
    """Keys between those of real prompts: four fifths of one, a third of another, and noise."""
    if real is None:
        return None
    rng = np.random.default_rng(seed)
    one, other = (real[rng.integers(len(real), size=count)] for _ in range(2))
    found = 0.8 * one + 0.35 * other + 0.03 * rng.normal(size=one.shape)
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


def seconds(do: object, clock: Callable[[], float], rounds: int = 20) -> float:
    """The median time of a call."""
    times = []
    for _ in range(rounds):
        start = clock()
        do()  # type: ignore[operator]
        times.append(clock() - start)
    return float(np.median(times))


def shares(router: Router, lm: LM, asked: argparse.Namespace) -> None:
    """Print the tables of shares."""
    unseen = read_records("atlas", split="test", limit=asked.limit).records
    rows = [same_subject(router, lm, unseen)]
    if asked.data != "atlas":
        rows = [*counterfact(router, lm, read_records(asked.data, limit=asked.limit).records), *rows]
    headings = (
        "prompts against others",
        "edits",
        *(f"hits at {rate:.0%}" for rate in RATES),
        "hits / fires, at 2%",
    )
    table("Paraphrases that find their edit, while a share of the others fires one", headings, rows)
    headings = ("prompt", "should be answered by", "share", "prompts")
    table("Hard cases", headings, hard(router, lm, unseen))
    if asked.data != "atlas":
        records = read_records(asked.data, limit=asked.limit).records
        cases = conversations(lm, records)
        table("Turns of a chat", headings, cases)
        if asked.text is not None:
            table("Plain text", headings, [passages(router, lm, records, asked.text)])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options = parser(__doc__)
    options.add_argument("--text", help="plain text; its first 1,000 paragraphs are asked")
    options.add_argument("--only-cost", action="store_true", help="print the last table alone")
    options.add_argument("--limit", type=int, default=1000, help="edits in memory")
    options.add_argument("--counts", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    asked = options.parse_args(argv)
    lm = load(asked)
    router = Router.shipped_for(lm)
    machine(asked)
    print(f"{lm.name}, {'a router of its own' if router.encoder is not None else 'the lexical router'}")
    if not asked.only_cost:
        shares(router, lm, asked)
    headings = (
        "edits",
        "routing a prompt",
        "of a forward pass",
        "adding one",
        "building, each",
        "bytes each",
        "opening",
    )
    if asked.counts:
        records = read_records(asked.data, split="train" if asked.data == "atlas" else None).records[:2000]
        table(
            "Cost, without the keys", headings, cost(router, lm, records, asked.counts, CLOCKS[asked.clock])
        )


if __name__ == "__main__":
    main()
