"""The effect of single edits combined in one model: added up, and fused.

Every edit is made from the clean model. Edit success and generalisation are scored on the facts whose edits are in the
model, locality on the first neighbour of each of ``--facts`` records, all teacher forced; perplexity on plain passages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import facts, load, machine, parser, table
from torch import Tensor

from emendo import Edit, Editor, fuse
from emendo._storage import cache_folder
from emendo.data.abilities import PASSAGES
from emendo.editors import editor_class
from emendo.edits import compose
from emendo.models.lm import LM
from emendo.models.losses import token_nll
from emendo.models.sites import find_sites
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts, to_texts

TOKENS = 48
"""The longest passage."""


class Scores:
    """Scores a model in its present state."""

    def __init__(self, lm: LM, probes: Sequence[tuple[str, str]]) -> None:
        self.lm, self.texts = lm, to_texts(lm, probes)
        self.passages = passage_texts(lm, PASSAGES, TOKENS)
        self.clean = self._answers(self.texts)

    def right(self, pairs: Sequence[tuple[str, str]]) -> float:
        """The share of pairs whose whole answer is the most likely one."""
        texts = to_texts(self.lm, pairs)
        answers = self._answers(texts)
        return sum(
            bool((own == torch.tensor(text.labels)).all()) for own, text in zip(answers, texts, strict=True)
        ) / len(texts)

    def kept(self) -> float:
        """The share of probes whose answer keeps all its tokens."""
        now = self._answers(self.texts)
        return sum(bool((a == b).all()) for a, b in zip(self.clean, now, strict=True)) / len(now)

    def perplexity(self) -> float:
        """The perplexity of the passages, over all their tokens."""
        lost = [
            token_nll(logits.cpu(), torch.tensor(text.labels))
            for text, logits in zip(self.passages, self.lm.logits(self.passages), strict=True)
        ]
        nll = float(torch.cat(lost).mean())
        return math.exp(nll) if nll < 700 else math.inf

    def _answers(self, texts: Sequence[Text]) -> list[Tensor]:
        return [logits.argmax(-1).cpu() for logits in self.lm.logits(texts)]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument(
        "--editor", required=True, help="a trained editor's folder, or a method without training"
    )
    made.add_argument("--counts", type=int, nargs="+", default=[1, 5, 25, 100])
    made.add_argument("--keep", type=float, nargs="+", default=[30.0], help="weights of running text")
    made.add_argument("--facts", type=int, default=200, help="records whose neighbours are asked")
    options = made.parse_args(arguments)
    machine(options)
    lm = load(options)
    if Path(options.editor).is_dir():
        editor = Editor.from_pretrained(options.editor)
    else:
        editor = editor_class(options.editor)(find_sites(lm.model))
    records = facts(options, max(options.facts, *options.counts))
    edits = [editor.edit(lm, record.prompt, record.target) for record in records[: max(options.counts)]]
    scores = Scores(
        lm,
        [(r.neighbours[0].prompt, r.neighbours[0].answer) for r in records[: options.facts] if r.neighbours],
    )
    folder = cache_folder() / "written"
    paraphrases = [record.paraphrases[:1] for record in records]
    methods: dict[str, Callable[[Sequence[Edit]], Edit]] = {"added up": compose}
    for keep in options.keep:
        methods[f"fused, keep {keep:g}"] = lambda own, keep=keep: fuse(lm, own, keep=keep, folder=folder)
        methods[f"fused with paraphrases, keep {keep:g}"] = lambda own, keep=keep: fuse(
            lm, own, paraphrases=paraphrases[: len(own)], keep=keep, folder=folder
        )
    rows = []
    for count in options.counts:
        own = records[:count]
        for name, combine in methods.items():
            before = time.perf_counter()
            edit = combine(edits[:count])
            seconds = time.perf_counter() - before
            with edit.applied(lm):
                rows.append(
                    (
                        count,
                        name,
                        scores.right([(r.prompt, r.target) for r in own]),
                        scores.right([(r.paraphrases[0], r.target) for r in own if r.paraphrases]),
                        scores.kept(),
                        scores.perplexity(),
                        seconds,
                    )
                )
    head = ("edits", "method", "success", "generalisation", "locality", "perplexity", "seconds")
    table(f"Edits of {options.editor} in one model; clean perplexity {scores.perplexity():.1f}", head, rows)


if __name__ == "__main__":
    main()
