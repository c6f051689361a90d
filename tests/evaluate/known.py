"""Editors of which one knows what they do: an oracle, and random changes of a given size.

Run on a real model, it measures both beside in-context editing and prints a table in Markdown::

    PYTHONPATH=tests python -m evaluate.known --data counterfact-dev.json --limit 60
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

import emendo
from emendo.data.records import read_records
from emendo.editors import Editor
from emendo.editors.base import as_requests
from emendo.editors.in_context import InContext, InContextConfig
from emendo.edits.edit import BaseEdit, Request
from emendo.evaluate import Evaluation, evaluate
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import Text


@dataclasses.dataclass(frozen=True, eq=False)
class Knowing(LM):
    """Says the target wherever a prompt is about the subject, and is its inner model elsewhere."""

    inner: LM = dataclasses.field(kw_only=True)
    facts: dict[Request, str] = dataclasses.field(kw_only=True)

    def told(self, text: Text) -> str | None:
        return self.about(self.tokenizer.decode(text.ids[: text.start], skip_special_tokens=True))

    def about(self, prompt: str) -> str | None:
        for fact, subject in self.facts.items():
            question = prompt.removeprefix(f"{fact.prompt} {fact.target}.")  # not what stands before it
            if subject in question:
                return fact.target
        return None

    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        found = self.inner.logits(texts)
        for rows, text in zip(found, texts, strict=True):
            if (target := self.told(text)) is not None:
                wanted = self.tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
                for row, token in zip(rows, wanted, strict=False):
                    row[token] = row.max() + 30
        return found

    def _words(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        said = self.inner.generate(prompts, max_new_tokens)
        targets = map(self.about, prompts)
        return [text if target is None else f" {target}." for target, text in zip(targets, said, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Known(BaseEdit):
    kind: ClassVar[str] = "known"
    facts: dict[Request, str]
    origin: Any
    card: Any = dataclasses.field(default_factory=dict)

    @contextmanager
    def applied(self, model: LM) -> Iterator[LM]:
        yield Knowing(model.model, model.tokenizer, model.name, inner=model, facts=self.facts)

    def _content(self) -> Any:
        raise NotImplementedError

    @classmethod
    def _restored(cls, *_: Any) -> Any:
        raise NotImplementedError


class Oracle(Editor):
    """Knows which prompts are about the edited subject."""

    name = "oracle"
    Config = dict
    makes = Known
    no_changes = "an oracle changes no weights"

    def __init__(self, subjects: dict[str, str]) -> None:
        super().__init__(())
        self.subjects = subjects

    def each(self, lm: LM, requests: Sequence[Request]) -> Any:
        raise NotImplementedError

    def edit(self, lm: LM, prompt: Any, target: str | None = None) -> Known:
        requests = as_requests(prompt, target)
        return Known({request: self.subjects[request.prompt] for request in requests}, None)


class Random(Editor):
    """Changes weights at random, by a share of what they are large: the norm of the change over theirs."""

    name = "random"
    Config = dict

    def __init__(self, sites: Sequence[Site], size: float = 3) -> None:
        super().__init__(tuple(sites))
        self.size = size

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        found = {}
        for number, site in enumerate(self.sites):
            generator = torch.Generator().manual_seed(number)
            left, right = (
                torch.randn(len(requests), *shape, generator=generator)
                for shape in ((site.d_out, 8), (8, site.d_in))
            )
            change = LowRank(left, right)
            size = float(site.weight(lm.model).norm()) / change.norm().float()
            found[site.name] = LowRank(left * self.size * size[:, None, None], right)
        return found


SHOWN = (
    *(("teacher_forced", name) for name in ("edit_success", "generalisation", "locality", "locality_told")),
    *(("token_fraction", name) for name in ("edit_success", "generalisation", "locality")),
    *(("free_generation", name) for name in ("edit_success", "generalisation", "locality")),
    *(("free_generation", name) for name in ("edit_success_full", "generalisation_full")),
    *(("probability", name) for name in ("target_after", "target_after_reworded", "old_after")),
    *(("rank", name) for name in ("target_after", "target_after_reworded")),
    *(("kl", name) for name in ("locality", "locality_told")),
    *(("counterfact", name) for name in ("efficacy", "paraphrase", "neighbourhood", "score")),
    *(("zsre", name) for name in ("efficacy", "paraphrase", "specificity", "specificity_clean")),
    *(("mend", name) for name in ("edit_success", "accuracy_drawdown")),
)
"""What the table shows."""


def table(runs: dict[str, Evaluation]) -> str:
    found = {name: run.as_dict()["scores"] for name, run in runs.items()}
    lines = ["| score | " + " | ".join(runs) + " |", "| --- " * (len(runs) + 1) + "|"]
    for group, name in SHOWN:
        cells = [scores.get(group, {}).get(name) for scores in found.values()]
        said = (
            f"{cell['mean']:.3f} ({cell['low']:.2f} to {cell['high']:.2f})" if cell else "" for cell in cells
        )
        lines.append(f"| {group}: {name} | " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description="Measure known editors on a real model.")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--data", required=True)
    options.add_argument("--limit", type=int, default=60)
    options.add_argument("--sizes", type=float, nargs="+", default=[0.01, 1.0])
    options.add_argument("--only", nargs="+", help="some of: oracle, in-context, random")
    given = options.parse_args()
    lm, chosen = emendo.load(given.model), read_records(given.data).records[: given.limit]
    editors: dict[str, Editor] = {
        **{f"random, {size:.0%}": Random(find_sites(lm.model), size) for size in given.sizes},
        "in-context": InContext((), InContextConfig()),
        "oracle": Oracle({record.prompt: record.subject or "" for record in chosen}),
    }
    runs: dict[str, Evaluation] = {}
    for name, editor in editors.items():
        if given.only and name.partition(",")[0] not in given.only:
            continue
        runs[name] = evaluate(lm, editor, chosen)
        sys.stderr.write(
            f"{name}: {runs[name].seconds_per_edit:.2f} s for an edit\n{table({name: runs[name]})}\n"
        )
    sys.stdout.write(table(runs))


if __name__ == "__main__":
    main()
