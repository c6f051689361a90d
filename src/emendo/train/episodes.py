"""Records to episodes: each batch is a function of the seed and the step alone, so checkpoints need no state of it."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emendo.data import Record
from emendo.editors.objective import Episode
from emendo.errors import TrainingError
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts, to_texts
from emendo.train.config import TrainConfig

GROUP = 4
"""Steps that are prepared together (see :meth:`emendo.editors.gradient.GradientEditor.look_ahead`)."""
WINDOW = 512
"""Records whose texts pass through the trunk together; the first epoch draws siblings from within a window."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    edit: Text
    paraphrases: list[Text]
    neighbours: list[Text]
    unrelated: list[Text]
    relation: str


class Episodes:
    """Draws batches of episodes from records.

    Args:
        lm: has the tokenizer and the context length.
        records: the training data.
        config: batch size, locality mix and seed.
        passages: running text for ``config.text``, one passage a string; without any, none is drawn.
        base: training sequences of the model's own task in each episode: passages, or else what the records hold of
            it, which is their prompts with the old answers and their probes.

    Raises:
        TrainingError: there are no records, or none of them can give the locality examples of the settings, or there
            is nothing to draw training sequences from.
        RequestError: a text that does not fit the model's context.
    """

    def __init__(
        self,
        lm: LM,
        records: Sequence[Record],
        config: TrainConfig,
        passages: Sequence[str] = (),
        base: int = 0,
    ) -> None:
        if not records:
            raise TrainingError("There are no records to train on.")
        self.config = config
        self.items = _encode(lm, [_shortened(record, config.variety) for record in records])
        if passages and lm.kind != "causal":
            raise TrainingError(f"--text is for decoders, and {lm.name} is none: leave --text out.")
        found = [_passage(lm, text) for text in passages] if config.text else []
        self.passages = [passage for passage in found if passage is not None]
        if found and not self.passages:
            raise TrainingError("The plain text has no passage of at least 4 tokens.")
        if len(self.items) < 2 and not (self.items[0].neighbours or self.items[0].unrelated):
            raise TrainingError("One record without neighbours is not enough: locality needs another text.")
        self.base, self._sequences = base, _task_texts(lm, records, passages) if base else []
        if base and not self._sequences:
            raise TrainingError(
                "base_loss=task needs training sequences: running text, or records with old answers or probes."
            )
        self._orders: dict[int, list[int]] = {}
        self._first = {item: place for place, item in enumerate(self._order(0))}
        self._siblings: dict[str, list[int]] = defaultdict(list)  # relation -> items, by place in epoch 0
        for item in self._order(0):
            self._siblings[self.items[item].relation].append(item)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.items)))
            random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            self._orders = {**{k: v for k, v in self._orders.items() if k >= epoch - 1}, epoch: order}
        return self._orders[epoch]

    def batch(self, step: int) -> list[Episode]:
        """The episodes of one optimiser step."""
        rng = random.Random(f"{self.config.seed}/step/{step}")
        count, size = len(self.items), self.config.batch
        places = range(step * size, (step + 1) * size)
        chosen = [(place, self._order(place // count)[place % count]) for place in places]
        episodes = [self._episode(item, place, rng) for place, item in chosen]
        if not self.base:
            return episodes
        rng = random.Random(f"{self.config.seed}/base/{step}")
        return [
            replace(episode, base=tuple(rng.choices(self._sequences, k=self.base))) for episode in episodes
        ]

    def edits(self, count: int) -> list[Text]:
        """The edits of the first records, in the order of the first epoch; of all records if they are fewer."""
        return [self.items[item].edit for item in self._order(0)[:count]]

    def window(self, step: int) -> list[Episode] | None:
        """The episodes of the steps that share a trunk window, at its first step; None at the others."""
        steps = self._window_steps
        if step % steps:
            return None
        return [episode for s in range(step, self._end(step + steps)) for episode in self.batch(s)]

    def rest_of_epoch(self, step: int) -> range:
        """The steps from the first of a group to the end of the epoch, in whole windows."""
        size = self.config.batch
        epoch_ends = -(-(step * size // len(self.items) + 1) * len(self.items) // size)
        return range(step, self._end(-(-epoch_ends // self._window_steps) * self._window_steps))

    @property
    def _window_steps(self) -> int:
        return max(1, WINDOW // self.config.batch // GROUP) * GROUP

    def _end(self, step: int) -> int:
        """That step, or the end of the run's last group."""
        return min(step, -(-self.config.steps // GROUP) * GROUP)

    def _episode(self, item: int, place: int, rng: random.Random) -> Episode:
        record, config = self.items[item], self.config
        limit = min(len(self.items), (place // WINDOW + 1) * WINDOW)
        locality = _pick(record.neighbours, config.near, rng)
        locality += [self._sibling(item, limit, rng) for _ in range(config.sibling)]
        own = _pick(record.unrelated, config.unrelated, rng)
        locality += own + [self._other(item, limit, rng) for _ in range(config.unrelated - len(own))]
        locality += _pick(self.passages, config.text, rng)
        if not locality:
            locality = [self._other(item, limit, rng)]
        paraphrase = rng.choice(record.paraphrases) if record.paraphrases else record.edit
        return Episode(record.edit, paraphrase, tuple(locality))

    def _sibling(self, item: int, limit: int, rng: random.Random) -> Text:
        """A text of another record of the same relation, else of any other record."""
        group = self._siblings[self.items[item].relation]
        reachable = bisect_left(group, limit, key=self._first.__getitem__)
        others = reachable - (self._first[item] < limit)
        if others < 1:
            return self._other(item, limit, rng)
        other = group[rng.randrange(reachable)]
        while other == item:
            other = group[rng.randrange(reachable)]
        return self._text(other, rng)

    def _other(self, item: int, limit: int, rng: random.Random) -> Text:
        if len(self.items) == 1:
            return rng.choice(self.items[0].neighbours or self.items[0].unrelated)
        order = self._order(0)
        reachable = max(2, min(limit, len(order)))
        other = order[rng.randrange(reachable)]
        while other == item:
            other = order[rng.randrange(reachable)]
        return self._text(other, rng)

    def _text(self, item: int, rng: random.Random) -> Text:
        record = self.items[item]
        return rng.choice([record.edit, record.edit, record.edit, *record.neighbours[:1]])


def _pick(texts: list[Text], count: int, rng: random.Random) -> list[Text]:
    return rng.sample(texts, min(count, len(texts)))


def _shortened(record: Record, variety: int) -> Record:
    """The record with at most ``variety`` texts of each kind."""
    return replace(
        record,
        paraphrases=record.paraphrases[:variety],
        neighbours=record.neighbours[:variety],
        unrelated=record.unrelated[:variety],
    )


def _encode(lm: LM, records: Sequence[Record]) -> list[_Encoded]:
    """All targets in one call of the tokenizer, closed as an edit's are, and all answers that must stay in another."""
    read = [replace(record, consequences=()).texts() for record in records]
    taught = [1 + len(record.paraphrases) for record in records]
    rows = list(zip(taught, read, strict=True))
    targets = iter(to_texts(lm, [pair for count, pairs in rows for pair in pairs[:count]], closed=True))
    answers = iter(to_texts(lm, [pair for count, pairs in rows for pair in pairs[count:]]))
    return [
        _Encoded(
            edit=next(targets),
            paraphrases=[next(targets) for _ in r.paraphrases],
            neighbours=[next(answers) for _ in r.neighbours],
            unrelated=[next(answers) for _ in r.unrelated],
            relation=r.relation or (r.prompt.replace(r.subject, "{}") if r.subject else r.prompt),
        )
        for r in records
    ]


def _task_texts(lm: LM, records: Sequence[Record], passages: Sequence[str]) -> list[Text]:
    """Training sequences of the model's own task.

    They are passages, of which every token but the first is predicted, or else what the records hold of the task.
    """
    if passages:
        return passage_texts(lm, passages, _CUT[1])
    pairs: dict[tuple[str, str, str | None], None] = {}
    for record in records:
        probes = [(probe.prompt, probe.answer) for probe in (*record.neighbours, *record.unrelated)]
        own = [(record.prompt, record.answer)] if record.answer is not None else []
        pairs |= dict.fromkeys((prompt, answer, record.separator) for prompt, answer in own + probes)
    return to_texts(lm, list(pairs)) if pairs else []


_CUT = (8, 32)
"""Shortest and longest passage, in tokens."""
_KEPT = 6
"""Number of its last tokens whose prediction must not change."""


def _passage(lm: LM, text: str) -> Text | None:
    """The beginning of a passage, of random length, so that every position is covered by some passages."""
    limit = random.Random(text).randint(*_CUT)
    ids = lm.tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return Text(tuple(ids), len(ids) - min(_KEPT, len(ids) // 2)) if len(ids) >= 4 else None
