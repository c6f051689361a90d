"""Editors of which one knows what they do must land where they must: an oracle, and random changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cases import build_lm, records
from emendo.data.abilities import Choice
from emendo.edit import AnyEdit, Request
from emendo.editors import Editor
from emendo.editors.base import as_requests
from emendo.evaluate import Evaluation, evaluate
from emendo.evaluate.damage import Damage
from emendo.lowrank import LowRank
from emendo.models import LM
from emendo.sites import find_sites
from emendo.texts import Text


@dataclasses.dataclass(frozen=True, eq=False)
class Knowing(LM):
    """Says the target wherever a prompt is about the subject, and is its inner model elsewhere."""

    inner: LM = dataclasses.field(kw_only=True)
    facts: dict[str, str] = dataclasses.field(kw_only=True)

    def told(self, text: Text) -> str | None:
        return self.about(self.tokenizer.decode(text.ids[: text.start]))

    def about(self, prompt: str) -> str | None:
        last = prompt.split(". ")[-1]  # the question itself, not what stands before it
        return next((target for subject, target in self.facts.items() if subject in last), None)

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
class Known(AnyEdit):
    kind: ClassVar[str] = "known"
    facts: dict[str, str]
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
    changes_weights = False

    def __init__(self, subjects: dict[str, str]) -> None:
        super().__init__(())
        self.subjects = subjects

    def each(self, lm: LM, requests: Sequence[Request]) -> Any:
        raise NotImplementedError

    def edit(self, lm: LM, prompt: Any, target: str | None = None) -> Known:
        requests = as_requests(prompt, target)
        return Known({self.subjects[r.prompt]: r.target for r in requests}, None)


class Random(Editor):
    """Changes weights at random, by as much as they are large."""

    name = "random"
    Config = dict

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
            found[site.name] = LowRank(left * 3 * size[:, None, None], right)
        return found


def damage() -> Damage:
    return Damage(
        ("The river is long and old.",), (Choice("grammar", "It", ("is", "are"), 0),), ("The",), 2, 12
    )


def means(found: Evaluation) -> dict[str, dict[str, float]]:
    plain = found.as_dict()["scores"]
    return {group: {name: score["mean"] for name, score in scores.items()} for group, scores in plain.items()}


def test_an_oracle_is_perfect_by_every_protocol() -> None:
    lm, chosen = build_lm("llama"), records(5)
    oracle = Oracle({record.prompt: record.subject or "" for record in chosen})
    found = evaluate(lm, oracle, chosen, damage=damage())
    scores = means(found)
    for group, name in (
        *(
            ("teacher_forced", name)
            for name in ("edit_success", "generalisation", "locality", "locality_told")
        ),
        *(("free_generation", name) for name in ("edit_success", "generalisation", "locality")),
        *(("free_generation", f"{name}_full") for name in ("edit_success", "generalisation")),
        *(("token_fraction", name) for name in ("edit_success", "generalisation", "locality")),
        *(("rank", name) for name in ("target_after", "target_reciprocal")),
        *(("counterfact", name) for name in ("efficacy", "paraphrase")),
        *(("zsre", name) for name in ("efficacy", "paraphrase")),
        ("mend", "edit_success"),
    ):
        assert scores[group][name] == 1, (group, name)
    assert scores["mend"]["accuracy_drawdown"] == 0
    assert scores["kl"]["locality"] == pytest.approx(0, abs=1e-6)
    assert scores["probability"]["target_after"] > 0.99
    assert scores["zsre"]["specificity"] == scores["zsre"]["specificity_clean"]
    for name, seen in found.as_dict()["damage"].items():
        assert seen["mean"] == pytest.approx(seen["clean"], rel=1e-4), name


def test_random_changes_are_bad_by_every_protocol() -> None:
    lm, chosen = build_lm("llama"), records(5)
    found = evaluate(lm, Random(find_sites(lm.model)), chosen, damage=damage())
    scores = means(found)
    for group in ("teacher_forced", "free_generation", "token_fraction"):
        for name in ("edit_success", "generalisation", "locality"):
            assert scores[group][name] <= 0.2, (group, name)
    assert scores["rank"]["target_after"] > 20
    assert scores["kl"]["locality"] > 1
    assert scores["probability"]["target_after"] < 0.05
    seen = found.as_dict()["damage"]["perplexity"]
    assert not 0.7 < seen["mean"] / seen["clean"] < 1.4  # a model that knows nothing may be worse than chance


def test_the_same_figures_twice() -> None:
    lm, chosen = build_lm("gpt2"), records(4)
    runs = [evaluate(lm, Random(find_sites(lm.model)), chosen, damage=damage()).as_dict() for _ in range(2)]
    times = ("seconds_per_edit", "seconds_per_edit_in_batch", "cost")
    one, two = ({k: v for k, v in run.items() if k not in times} for run in runs)
    assert json.dumps(one) == json.dumps(two)
